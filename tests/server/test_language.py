"""Programs on the bundled model: in this process, on a server, and over that server's OpenAI interface."""

from __future__ import annotations

import gc
import itertools
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import trunkline as sgl
from trunkline.lang.backends.backend import Prompt
from trunkline.lang.backends.engine import EngineBackend
from trunkline.lang.backends.runtime import free_port
from trunkline.lang.executor import ProgramCancelled
from trunkline.lang.ir import run_sampling
from trunkline.lang.program import resolve_backend
from trunkline.types import RequestError

QUESTION = "What is 14 plus 9?"


@pytest.fixture(scope="module")
def runtime() -> Iterator[sgl.Runtime]:
    with sgl.Runtime(cpu_threads=1, max_total_tokens=16384, api_key="key") as runtime:
        yield runtime


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    with sgl.Engine(cpu_threads=1, max_total_tokens=16384, log_level="error") as engine:
        yield engine


@pytest.fixture(params=["engine", "runtime", "remote"])
def backend(request: pytest.FixtureRequest) -> Any:
    """An engine here, a server whose model folder is here, and a server whose folder isn't."""
    if request.param != "remote":
        return request.getfixturevalue(request.param)
    url = request.getfixturevalue("runtime").url
    endpoint = sgl.RuntimeEndpoint(url, api_key="key")
    endpoint.chat_template = request.getfixturevalue("runtime").endpoint.chat_template
    endpoint.tokenizer = None
    return endpoint


@sgl.function
def chat(s: Any, question: str) -> None:
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen("a", max_tokens=32, temperature=0))


@sgl.function
def two_turns(s: Any) -> None:
    s += sgl.user("My name is Alice.") + sgl.assistant(sgl.gen("hello", temperature=0))
    s += sgl.user("What is my name?") + sgl.assistant(sgl.gen("name", temperature=0))


def test_chat_follows_the_models_own_template(backend: Any) -> None:
    state = chat.run(QUESTION, backend=backend)
    assert state["a"] == "14 + 9 = 23"
    assert state.messages()[0] == {"role": "user", "content": QUESTION}
    assert state.get_meta_info("a")["finish_reason"]["type"] == "stop"
    assert "Alice" in two_turns.run(backend=backend)["name"]


def test_streaming(backend: Any) -> None:
    state = chat.run(QUESTION, backend=backend, stream=True)
    assert "".join(state.text_iter("a")) == "14 + 9 = 23"
    prompt = state.text().split("14 + 9 = 23")[0]

    async def pieces() -> list[Any]:
        sampling = run_sampling({"temperature": 0.0, "max_new_tokens": 32})
        stream = resolve_backend(backend).generate(Prompt(prompt), sampling, stream=True)
        return [piece async for piece, _ in stream]

    found = sgl.global_config.run(pieces())  # as they come: a reader may be slower and see several as one
    assert "".join(found) == "14 + 9 = 23" and len(found) > 3


async def test_streaming_with_meta_data(backend: Any) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.user(QUESTION)
        s += sgl.assistant(sgl.gen("a", temperature=0, return_logprob=True))

    state = program.run(backend=backend, stream=True)
    pairs = [pair async for pair in state.text_async_iter("a", return_meta_data=True)]
    assert "".join(text for text, _ in pairs) == "14 + 9 = 23"
    lengths = [len(meta["output_token_logprobs"]) for _, meta in pairs]
    assert lengths == sorted(lengths) and lengths[-1] == state.get_meta_info("a")["completion_tokens"]


@pytest.mark.parametrize(
    "method",
    [sgl.token_length_normalized, sgl.greedy_token_selection, sgl.unconditional_likelihood_normalized],
)
def test_select(backend: Any, method: Any) -> None:
    @sgl.function
    def program(s: Any, shown: int, choices: list[str]) -> None:
        s += sgl.user("What is 2 plus 3?")
        s += sgl.assistant_begin() + "2 + 3 = 5"[:shown] + sgl.select("x", choices, choices_method=method)

    for shown, choices in ((7, [" 4", " 5", " 6", " 15"]), (8, ["4", "5", "6"]), (4, ["4 = 7", "3 = 5"])):
        state = program.run(shown, choices, backend=backend)
        assert state["x"].strip() in ("5", "3 = 5"), state.get_meta_info("x")


def test_select_scores_are_those_of_the_whole_text(engine: Any) -> None:
    """Against a direct calculation: log-probabilities of all tokens from where the texts part."""

    @sgl.function
    def program(s: Any) -> None:
        s += "The word is ho" + sgl.select("x", ["use", "t", "llow tree"])

    entries = program.run(backend=engine).get_meta_info("x")["input_token_logprobs"]
    base = engine.tokenizer.encode("The word is ho")
    for choice, found in zip(["use", "t", "llow tree"], entries, strict=True):
        ids = engine.tokenizer.encode("The word is ho" + choice)
        at = next((i for i, (a, b) in enumerate(zip(base, ids, strict=False)) if a != b), len(base))
        whole = engine.generate(
            input_ids=ids, sampling_params={"max_new_tokens": 0}, return_logprob=True, logprob_start_len=0
        )["meta_info"]["input_token_logprobs"]
        assert [entry[1] for entry in found] == ids[at:]
        assert [entry[0] for entry in found] == [entry[0] for entry in whole[at:]]


def test_branches_and_batches(backend: Any) -> None:
    @sgl.function
    def sums(s: Any) -> None:
        forks = s.fork(3)
        forks += lambda i: sgl.user(f"What is {i} plus 2?")
        forks += sgl.assistant(sgl.gen("sum", temperature=0))
        forks.join()

    assert sums.run(backend=backend)["sum"] == [f"{i} + 2 = {i + 2}" for i in range(3)]
    states = chat.run_batch([(f"What is {i % 10} plus 1?",) for i in range(40)], backend=backend)
    assert [state["a"] for state in states] == [f"{i % 10} + 1 = {i % 10 + 1}" for i in range(40)]


def test_the_next_call_sends_the_tokens_that_were_generated(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only new text is tokenized, and all that was computed is found again."""
    encoded: list[str] = []
    calls: list[dict[str, Any]] = []
    encode, call = type(engine.tokenizer).encode, EngineBackend.call

    def noting_encode(self: Any, text: str, **more: Any) -> list[int]:
        encoded.append(text)
        return encode(self, text, **more)

    async def noting_call(self: Any, fields: dict[str, Any]) -> Any:
        answer = await call(self, fields)
        calls.append({**fields, "answer": answer})
        return answer

    monkeypatch.setattr(type(engine.tokenizer), "encode", noting_encode)
    monkeypatch.setattr(EngineBackend, "call", noting_call)

    @sgl.function
    def turns(s: Any) -> None:
        s += "abc " * 30
        for i in range(4):
            s += f" step {i}:" + sgl.gen(f"x{i}", max_tokens=20, stop="e")

    state = turns.run(backend=engine, temperature=1.5)
    state.sync()
    assert sum(map(len, encoded)) <= len(state.text()) + 20  # each character about once
    for before, after in itertools.pairwise(calls):
        known = before["input_ids"]
        assert after["input_ids"][: len(known)] == known
        meta = after["answer"]["meta_info"]
        assert meta["cached_tokens"] >= len(known) - 16  # all of its full pages
    shown = engine.tokenizer.decode(calls[-1]["input_ids"], skip_special_tokens=False)
    assert state.text().startswith(shown)


def test_flush_and_information(backend: Any) -> None:
    sgl.flush_cache(backend)
    assert "internal_states" in sgl.get_server_info(backend)
    assert chat.run(QUESTION, backend=backend).get_meta_info("a")["cached_tokens"] == 0


def test_a_common_prefix_is_computed_once(engine: Any) -> None:
    @sgl.function
    def program(s: Any) -> Any:
        s += "a common prefix of some length, " * 20
        forks = s.fork(4)
        forks += lambda i: f"branch {i}" + sgl.gen("x", max_tokens=4, ignore_eos=True)
        return [branch.get_meta_info("x") for branch in forks]

    sgl.flush_cache(engine)
    for meta in program.run(backend=engine).ret_value:
        assert meta["cached_tokens"] > 0.8 * meta["prompt_tokens"]


def test_what_the_server_refuses(backend: Any) -> None:
    @sgl.function
    def program(s: Any, **more: Any) -> None:
        s += "x" + sgl.gen("a", **more)

    for more, param in (({"temperature": -1.0}, "temperature"), ({"top_p": 2.0}, "top_p")):
        with pytest.raises(RequestError) as caught:
            program.run(backend=backend, **more).sync()
        assert caught.value.status == 400 and param in str(caught.value.param)
        assert "test_language.py" in caught.value.__notes__[0]

    @sgl.function
    def look(s: Any) -> None:
        s += sgl.image("x.png")

    with pytest.raises(RequestError, match="images: it takes text only"):
        look.run(backend=backend).sync()


def test_a_program_that_is_given_up_leaves_nothing_running(backend: Any) -> None:
    @sgl.function
    def program(s: Any) -> None:
        forks = s.fork(3)
        forks += lambda i: f"branch {i}" + sgl.gen("x", max_tokens=4000, ignore_eos=True)
        forks.join()

    def count(name: str) -> int:
        return int(sgl.get_server_info(backend)["internal_states"][0][name])

    state, before = program.run(backend=backend), count("steps")
    while count("running") < 3:
        time.sleep(0.001)
    state.stream_executor.cancel()
    while count("running"):
        time.sleep(0.01)
    assert count("steps") - before < 2000  # of 4,000
    with pytest.raises(ProgramCancelled):
        state.sync()


def test_long_programs_send_what_is_new(runtime: sgl.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a session, with the same answers; branches go on from the same place, and lost sessions cost
    nothing but bytes."""
    monkeypatch.setattr("trunkline.lang.backends.runtime_endpoint.SESSION_FROM", 64)
    sent: list[dict[str, Any]] = []
    endpoint = sgl.RuntimeEndpoint(runtime.url, api_key="key")
    call = endpoint.call

    async def noted(fields: dict[str, Any]) -> Any:
        sent.append(fields)
        return await call(fields)

    @sgl.function
    def talk(s: Any, lose: bool = False) -> None:
        s += sgl.system("A long beginning. " * 40)
        for turn in range(6):
            s += sgl.user(f"What is {turn} plus 9?")
            s += sgl.assistant(sgl.gen(f"a{turn}", max_tokens=8, temperature=0))
            if lose and turn == 3:
                s.sync()
                name = next(fields["session_params"]["id"] for fields in reversed(sent))
                sgl.global_config.run(endpoint._http.json("POST", "/close_session", {"session_id": name}))
        forks = s.fork(2)
        for i, fork in enumerate(forks):
            fork += sgl.user(f"And {i}?") + sgl.assistant(sgl.gen("b", max_tokens=8, temperature=0))
        s["b"] = [fork["b"] for fork in forks]

    endpoint._has_sessions = False
    plain = talk.run(backend=endpoint)
    expected = {name: plain[name] for name in ("a0", "a5", "b")}
    endpoint._has_sessions = True
    monkeypatch.setattr(endpoint, "call", noted)
    state = talk.run(backend=endpoint)
    assert {name: state[name] for name in expected} == expected
    turns = [fields for fields in sent if "session_params" in fields]
    assert len(turns) == 8 and len({fields["session_params"]["id"] for fields in turns}) == 1
    assert all(len(fields["input_ids"]) < 64 for fields in turns[1:])
    assert len({fields["session_params"].get("rid") for fields in turns[-2:]}) == 1
    sent.clear()
    assert {name: talk.run(lose=True, backend=endpoint)[name] for name in expected} == expected

    def open_sessions() -> int:
        return int(endpoint.get_server_info()["sessions"]["open"])

    assert open_sessions() >= 1
    del state, plain
    gc.collect()
    while open_sessions():
        time.sleep(0.02)


def test_openai_interface(runtime: sgl.Runtime) -> None:
    model = runtime.get_server_info()["model"]["served_model_name"]
    url = f"{runtime.url}/v1"
    over_chat = sgl.OpenAI(model, is_chat_model=True, api_key="key", base_url=url)
    assert chat.run(QUESTION, backend=over_chat)["a"] == "14 + 9 = 23"
    assert "".join(chat.run(QUESTION, backend=over_chat, stream=True).text_iter("a")) == "14 + 9 = 23"
    assert over_chat.token_usage.completion_tokens == 20
    template = runtime.endpoint.get_chat_template()
    plain = sgl.OpenAI(model, is_chat_model=False, chat_template=template, api_key="key", base_url=url)
    assert chat.run(QUESTION, backend=plain)["a"] == "14 + 9 = 23"

    @sgl.function
    def choose(s: Any) -> None:
        s += sgl.user("What is 2 plus 3?")
        s += sgl.assistant_begin() + "2 + 3 =" + sgl.select("x", [" 4", " 5", " 6"])

    assert choose.run(backend=plain)["x"] == " 5"

    @sgl.function
    def text(s: Any, **more: Any) -> None:
        s += sgl.user("Who are you?") + sgl.assistant(
            sgl.gen_string("x", max_tokens=24, temperature=0, **more)
        )

    for backend in (over_chat, plain):
        assert re.fullmatch(r'"[^"]*"?', text.run(backend=backend)["x"])
    with pytest.raises(RequestError, match="does not support logprob_start_len"):
        text.run(logprob_start_len=0, backend=plain).sync()

    @sgl.function(num_api_spec_tokens=32)
    def one_call(s: Any) -> None:
        s += sgl.user(QUESTION)
        s += sgl.assistant(sgl.gen("left", stop=" =") + " = " + sgl.gen("right", stop="\n"))

    before = over_chat.token_usage.prompt_tokens
    state = one_call.run(backend=over_chat, temperature=0)
    assert (state["left"], state["right"]) == ("14 + 9", "23")
    assert over_chat.token_usage.prompt_tokens - before < 60  # one call


def test_anthropic_interface(runtime: sgl.Runtime) -> None:
    model = runtime.get_server_info()["model"]["served_model_name"]
    backend = sgl.Anthropic(model, api_key="key", base_url=runtime.url)
    metas = []
    for stream in (False, True):
        state = chat.run(QUESTION, backend=backend, stream=stream)
        assert "".join(state.text_iter("a")) == state["a"] == "14 + 9 = 23"
        metas.append(state.get_meta_info("a"))
    assert metas[0] | {"cached_tokens": 0} == metas[1] | {"cached_tokens": 0}
    assert metas[1]["cached_tokens"] == 16
    assert metas[0]["finish_reason"] == {"type": "end_turn"}
    assert metas[0]["prompt_tokens"] > metas[0]["completion_tokens"] == 10
    assert "Alice" in two_turns.run(backend=backend)["name"]

    @sgl.function
    def continued(s: Any, start: str, **more: Any) -> None:
        s += sgl.system("You add.") + sgl.user(QUESTION)
        s += sgl.assistant(start + sgl.gen("x", temperature=0, **more))

    state = continued.run("14 + 9 =", backend=backend)
    assert state["x"].strip() == "23" and state.messages()[-1]["content"].startswith("14 + 9 =")
    state = continued.run("", stop=" =", backend=backend)
    assert state["x"] == "14 + 9" and state.get_meta_info("x")["finish_reason"]["type"] == "stop_sequence"
    state = continued.run("", max_tokens=2, top_p=0.9, top_k=3, backend=backend)
    assert state.get_meta_info("x")["finish_reason"]["type"] == "max_tokens"
    assert state.get_meta_info("x")["completion_tokens"] == 2
    schema = '{"type": "object", "properties": {"sum": {"enum": [23, 24]}}, "required": ["sum"], '
    schema += '"additionalProperties": false}'
    for stream in (False, True):
        state = continued.run("", max_tokens=32, json_schema=schema, backend=backend, stream=stream)
        assert json.loads("".join(state.text_iter("x"))) in ({"sum": 23}, {"sum": 24})
    error = continued.run("", json_schema='{"type": "nothing"}', backend=backend).error()
    assert isinstance(error, RequestError) and (error.status, error.param) == (
        400,
        "output_config.format.schema",
    )
    states = chat.run_batch([(f"What is {i} plus 1?",) for i in range(1, 9)], backend=backend)
    assert [one["a"] for one in states] == [f"{i} + 1 = {i + 1}" for i in range(1, 9)]
    for stream in (False, True):
        state = continued.run("", top_p=2.0, backend=backend, stream=stream)
        with pytest.raises(RequestError, match="top_p") as caught:
            "".join(state.text_iter("x"))
        assert caught.value.status == 400
    wrong = sgl.Anthropic(model, api_key="wrong", base_url=runtime.url)
    error = chat.run(QUESTION, backend=wrong).error()
    assert isinstance(error, RequestError) and error.status == 401


def test_a_runtime_without_a_program(runtime: sgl.Runtime, tmp_path: Path) -> None:
    answer = runtime.generate("Hello", {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True})
    assert answer["meta_info"]["completion_tokens"] == 4
    runtime.cache_prefix("some text to keep " * 10)
    again = runtime.generate("some text to keep " * 10, {"max_new_tokens": 1})
    assert again["meta_info"]["cached_tokens"] > 16
    assert runtime.get_tokenizer().encode("Hello")
    assert len(runtime.encode("Hello")["embedding"]) > 8
    assert runtime.start_profile(output_dir=str(tmp_path))["message"] == "profiling"
    assert Path(runtime.stop_profile()["path"]).parent == tmp_path
    with pytest.raises(AttributeError):
        _ = runtime.enocde


def test_a_runtime_ends_when_its_parent_is_killed() -> None:
    """And not when the thread that started it ends."""
    program = (
        "import threading, time, trunkline as sgl\n"
        "def start():\n"
        "    global kept\n"
        "    kept = sgl.Runtime(cpu_threads=1, max_total_tokens=1024)\n"
        "thread = threading.Thread(target=start)\n"
        "thread.start(); thread.join(); time.sleep(0.3)\n"
        "answer = kept.generate('a', {'max_new_tokens': 1})\n"
        "print(kept.pid, answer['meta_info']['completion_tokens'], flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, tokens = map(int, parent.stdout.readline().split())
        assert tokens == 1
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        assert len(family) >= 2
        parent.kill()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []


async def test_a_runtime_streams_to_any_loop(runtime: sgl.Runtime) -> None:
    params = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
    whole = runtime.generate("Hello", params)["text"]
    assert "".join([text async for text in runtime.async_generate("Hello", params)]) == whole


def test_a_wrong_key_and_no_server(runtime: sgl.Runtime, free_port: int) -> None:
    with pytest.raises(RequestError) as caught:
        sgl.RuntimeEndpoint(runtime.url, api_key="wrong")
    assert caught.value.status == 401
    with pytest.raises(OSError):
        sgl.RuntimeEndpoint(f"http://127.0.0.1:{free_port}")


def test_a_runtime_ends_its_server() -> None:
    runtime = sgl.Runtime(cpu_threads=1, max_total_tokens=1024)
    process = psutil.Process(runtime.pid)
    del runtime
    gc.collect()
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_runtime_that_can_not_start() -> None:
    with pytest.raises(RequestError, match="page-sise"):
        sgl.Runtime(page_sise=3)
    started = time.monotonic()
    with pytest.raises(RequestError, match="ended with status"):
        sgl.Runtime(model_path="/nowhere/model", log_level="critical")
    assert time.monotonic() - started < 30


def test_free_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port("127.0.0.1", port) > port


@pytest.mark.parametrize(
    ("constraint", "form"),
    [
        ({"regex": r"[A-Z][a-z]{3,5}: [0-9]{2}"}, r"[A-Z][a-z]{3,5}: [0-9]{2}"),
        ({"dtype": int}, r"[-+]?[0-9]+"),
        ({"dtype": bool}, r"True|False"),
        ({"json_schema": '{"type": "boolean"}'}, r"\s*(true|false)"),
    ],
)
def test_constrained_text(backend: Any, constraint: dict[str, Any], form: str) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.user("Who are you?")
        s += sgl.assistant(sgl.gen("x", max_tokens=24, temperature=0, **constraint))

    assert re.fullmatch(form, program.run(backend=backend)["x"])


def test_a_constraint_that_can_not_be_met_is_refused(backend: Any) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "x" + sgl.gen("x", json_schema='{"type": "nothing"}')

    with pytest.raises(RequestError) as caught:
        program.run(backend=backend).sync()
    assert caught.value.status == 400 and "json_schema" in str(caught.value.param)
