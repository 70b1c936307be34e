"""Structured output from end to end: real grammars and core, a tiny model, over HTTP and offline (P5-P7)."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

import trunkline
from tests.pure.grammar.support import HAS_XGRAMMAR
from tests.server.test_live import MESSAGES, Server
from trunkline.types import RequestError

SCHEMA = {
    "type": "object",
    "properties": {
        "name_of_the_animal": {"type": "string", "maxLength": 6},
        "number_of_legs": {"type": "integer", "minimum": 0, "maximum": 8},
        "kind": {"enum": ["wild", "tame"]},
    },
    "required": ["name_of_the_animal", "number_of_legs", "kind"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "animal", "strict": True, "schema": SCHEMA}}
LONG = {"max_new_tokens": 120}


def engine_of(model: Path, **flags: Any) -> Any:
    return trunkline.Engine(
        model_path=str(model), max_total_tokens=4096, context_length=512, cpu_threads=1, **flags
    )


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Any]:
    with engine_of(tiny_model) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    server = Server(tiny_model, "--served-model-name", "tiny")
    yield server
    code, output = server.stop()
    assert code == 0 and "Traceback" not in output, output


# ---------------------------------------------------------------------- offline
@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_every_output_matches_its_own_grammar(engine: Any, temperature: float) -> None:
    kinds: list[dict[str, Any]] = [
        {"json_schema": SCHEMA},
        {"regex": "(foo|ba[rz]){2,4}-[0-9]{3}"},
        {"ebnf": 'root ::= "x" root "y" | "z"', "max_new_tokens": 40},
        {},
        {"json_schema": {"type": "array", "items": {"type": "boolean"}, "maxItems": 5}},
    ]
    params = [
        {**LONG, "temperature": temperature, "sampling_seed": i, **kind} for i, kind in enumerate(kinds * 3)
    ]
    answers = engine.generate([f"prompt {i}" for i in range(len(params))], params)
    for asked, answer in zip(params, answers, strict=True):
        text, finish = answer["text"], answer["meta_info"]["finish_reason"]["type"]
        if "json_schema" in asked:
            jsonschema.validate(json.loads(text), asked["json_schema"])
        elif "regex" in asked:
            assert re.fullmatch(asked["regex"], text)
        elif "ebnf" in asked:
            assert re.fullmatch("x*zy*" if finish == "stop" else "x*(zy*)?", text)
            assert finish == "length" or text.count("x") == text.count("y")
        assert ("forced_tokens" in answer["meta_info"]) == (
            asked.keys() & {"json_schema", "regex", "ebnf"} != set()
        )


def test_ignore_eos_and_a_minimum_do_not_outlive_a_grammar(engine: Any) -> None:
    params = {**LONG, "regex": "[ab]{3}", "ignore_eos": True, "min_new_tokens": 50}
    answer = engine.generate("x", params)
    assert re.fullmatch("[ab]{3}", answer["text"])
    assert answer["meta_info"]["finish_reason"]["type"] == "stop"
    longer = engine.generate("x", {**LONG, "regex": "[ab]*", "min_new_tokens": 12})
    assert longer["meta_info"]["completion_tokens"] >= 12


def test_stop_strings_and_limits_hold_within_forced_text(engine: Any) -> None:
    params = {**LONG, "json_schema": SCHEMA, "temperature": 0.0}
    whole = engine.generate("x", params)
    stopped = engine.generate("x", {**params, "stop": "_of_the_"})
    assert stopped["text"] == whole["text"].split("_of_the_")[0]
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": "_of_the_"}
    for limit in (1, 2, 5):
        cut = engine.generate("x", {**params, "max_new_tokens": limit})
        assert cut["output_ids"] == whole["output_ids"][:limit]
        assert cut["meta_info"]["finish_reason"] == {"type": "length", "length": limit}
    # a stop token that the grammar dictates ends the output there
    third = whole["output_ids"][2]
    ended = engine.generate("x", {**params, "stop_token_ids": [third]})
    at = whole["output_ids"].index(third)
    assert ended["output_ids"] == whole["output_ids"][: at + 1]


def test_logprobs_come_with_every_token_and_change_none(engine: Any) -> None:
    params = {**LONG, "json_schema": SCHEMA, "temperature": 1.0, "sampling_seed": 5}
    plain = engine.generate("x", params)
    scored = engine.generate("x", params, return_logprob=True)
    assert scored["output_ids"] == plain["output_ids"]
    entries = scored["meta_info"]["output_token_logprobs"]
    assert [entry[1] for entry in entries] == scored["output_ids"]
    assert plain["meta_info"]["forced_tokens"] == scored["meta_info"]["forced_tokens"] > 5


@pytest.mark.parametrize(
    "flags",
    [
        {"disable_jump_forward": True},
        {"overlap_depth": 1},
        {"overlap_depth": 2, "page_size": 1, "chunked_prefill_size": 16, "max_running_requests": 4},
        {"overlap_depth": 1, "disable_radix_cache": True, "mix": "never"},
    ],
    ids=str,
)
def test_settings_change_no_token(engine: Any, tiny_model: Path, flags: dict[str, Any]) -> None:
    prompts = [f"animal {i} " * (1 + i % 3) for i in range(9)]
    params = [
        {**LONG, "temperature": i % 2, "sampling_seed": i, **({} if i % 3 == 2 else {"json_schema": SCHEMA})}
        for i in range(9)
    ]
    want = [answer["output_ids"] for answer in engine.generate(prompts, params)]
    with engine_of(tiny_model, **flags) as other:
        for _ in range(2):
            assert [answer["output_ids"] for answer in other.generate(prompts, params)] == want


def test_forced_tokens_save_steps(engine: Any, tiny_model: Path) -> None:
    def steps(engine: Any) -> int:
        return int(engine.get_server_info()["internal_states"][0]["steps"])

    params = {**LONG, "json_schema": SCHEMA, "temperature": 0.0}
    used, forced = [], []
    with engine_of(tiny_model, disable_jump_forward=True) as slow:
        for one in (engine, slow):
            before = steps(one)
            answer = one.generate("a new prompt", params)
            used.append((steps(one) - before, answer["meta_info"]["completion_tokens"]))
            forced.append(answer["meta_info"]["forced_tokens"])
    (fast_steps, tokens), (slow_steps, same) = used
    assert tokens == same == slow_steps and forced[0] == forced[1]
    assert fast_steps < 0.7 * slow_steps


def test_no_backend_is_said(tiny_model: Path) -> None:
    with engine_of(tiny_model, grammar_backend="none") as engine:
        with pytest.raises(RequestError) as caught:
            engine.generate("x", {"regex": "a"})
        assert caught.value.code == "no_grammar_backend"
        assert engine.generate("x", {"max_new_tokens": 3})["meta_info"]["completion_tokens"] == 3


@pytest.mark.skipif(not HAS_XGRAMMAR, reason="xgrammar is not installed")
def test_the_other_backend_gives_the_same_tokens(engine: Any, tiny_model: Path) -> None:
    params: list[dict[str, Any]] = [
        {"json_schema": SCHEMA},
        {"regex": "(very ){2,9}good"},
        {"ebnf": 'root ::= "(" root ")" | [a-z]{3}'},
    ]
    with engine_of(tiny_model, grammar_backend="xgrammar") as other:
        forced = []
        for seed, one in enumerate(params):
            fields = {**LONG, **one, "sampling_seed": seed}
            expected, answer = (e.generate("x", fields) for e in (engine, other))
            assert answer["output_ids"] == expected["output_ids"]
            forced.append(answer["meta_info"]["forced_tokens"])
            assert forced[-1] == expected["meta_info"]["forced_tokens"]
        assert any(forced)
        with pytest.raises(RequestError) as caught:
            other.generate("x", {"json_schema": {"type": "array", "uniqueItems": True}})
        assert caught.value.code == "unsupported_grammar"


def test_a_backend_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match="pip install") as caught:
        engine_of(tiny_model, grammar_backend="xgrammar")
    assert (caught.value.code, caught.value.param) == ("missing_package", "--grammar-backend")


# ---------------------------------------------------------------------- over HTTP
def test_openai_client(server: Server) -> None:
    user = openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)
    whole = user.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=120, seed=3, response_format=FORMAT, n=2
    )
    for choice in whole.choices:
        jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)
        assert choice.finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.to_dict()["completion_tokens_details"]["forced_tokens"] > 10
    parts = user.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=120, seed=3, response_format=FORMAT, n=2, stream=True
    )
    texts = ["", ""]
    for part in parts:
        for choice in part.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    completion = user.completions.create(
        model="tiny", prompt="x", max_tokens=50, extra_body={"regex": "[0-9]{4}", "n": 2}
    )
    assert all(re.fullmatch("[0-9]{4}", choice.text) for choice in completion.choices)
    answer = user.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=20, response_format={"type": "json_object"}
    )
    assert (answer.choices[0].message.content or "").lstrip().startswith("{")


BAD: list[tuple[dict[str, Any], str, str, str]] = [
    ({"regex": "a("}, "regex", "", "invalid_grammar"),
    ({"regex": r"(a)\1"}, "regex", "", "unsupported_grammar"),
    ({"ebnf": "root ::= other"}, "ebnf", "", "invalid_grammar"),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"schema": {"properties": {"a": {"tpye": 1}}}},
            }
        },
        "response_format.json_schema.schema",
        "/properties/a/tpye",
        "unsupported_grammar",
    ),
    ({"response_format": {"type": "structural_tag"}}, "response_format", "", "invalid_grammar"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "param", "pointer", "code"), BAD, ids=str)
def test_bad_grammars_are_refused(
    server: Server, fields: dict[str, Any], param: str, pointer: str, code: str, stream: bool
) -> None:
    answer = server.http.post("/v1/chat/completions", json={"messages": MESSAGES, **fields, "stream": stream})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code), error
    assert error["pointer"].startswith(pointer)


HOSTILE: list[dict[str, Any]] = [
    {"regex": "(" * 3000 + "a" + ")" * 3000},
    {"regex": "((a{1,500}){1,500}){1,500}"},
    {"regex": "(a|aa|aaa)*b[^x]{9999}(a?){3000}"},
    {"json_schema": {"$defs": {str(i): {"type": "object"} for i in range(30_000)}}},
    {"ebnf": "root ::= " + " | ".join(f'"{i:06}"' for i in range(70_000))},
]


@pytest.mark.parametrize("params", HOSTILE, ids=lambda params: str(params)[:30])
def test_a_hostile_grammar_costs_its_sender_only(server: Server, params: dict[str, Any]) -> None:
    """It is answered in bounded time, and a stream beside it goes on."""
    body = {"text": "hi", "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}, "stream": True}
    gaps: list[float] = []
    started = threading.Event()

    def read() -> None:
        last = time.monotonic()
        with server.http.stream("POST", "/generate", json=body) as stream:
            for _ in stream.iter_lines():
                started.set()
                now = time.monotonic()
                gaps.append(now - last)
                last = now

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        assert started.wait(30)
        begun = time.monotonic()
        answer = server.http.post("/generate", json={"text": "x", "sampling_params": {**LONG, **params}})
        assert time.monotonic() - begun < 5
        assert answer.status_code in (200, 400), answer.text
        if answer.status_code == 400:
            assert answer.json()["error"]["code"] in (
                "grammar_too_complex",
                "invalid_grammar",
                "unsupported_grammar",
            )
        reading.result(60)
    assert len(gaps) >= 400 and max(gaps[1:]) < 1.0
    server.wait(lambda: server.pages_in_use() == 0, 10)


def test_leaving_while_a_grammar_compiles_frees_all(server: Server) -> None:
    slow = {"ebnf": "root ::= " + " | ".join(f'"{i:06}" [a-z]{{1,40}}' for i in range(20_000))}
    with pytest.raises(Exception, match="timed out"):
        server.http.post("/generate", json={"text": "x", "sampling_params": slow}, timeout=0.05)
    server.wait(lambda: server.pages_in_use() == 0, 10)
    assert server.http.post(
        "/generate", json={"text": "x", "sampling_params": {"max_new_tokens": 2}}
    ).is_success
