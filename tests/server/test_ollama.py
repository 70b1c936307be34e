"""Ollama's interface: lines, options, errors; a stream joined is the whole answer (P3)."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.server.conftest import http_client, make_app
from tests.server.fake_client import FakeClient
from trunkline.config.schema import EngineConfig
from trunkline.text.tokenizer import Tokenizer

CHAT, GENERATE = "/api/chat", "/api/generate"
HI: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
DURATIONS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")


def app_with(tokenizer: Tokenizer, config: EngineConfig, reply: str, **more: Any) -> httpx.AsyncClient:
    tokens = tokenizer.encode(reply)
    return http_client(
        make_app(FakeClient(lambda _: tokens, eos=2, vocab_size=400, **more), tokenizer, config)
    )


def joined(text: str) -> dict[str, Any]:
    """What a client makes of the lines."""
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    whole = dict(lines[-1])
    parts = [line.get("message", line) for line in lines]
    pieces: dict[str, Any] = {
        name: "".join(part.get(name, "") for part in parts)
        for name in ("content", "response", "thinking")
        if any(name in part for part in parts)
    }
    calls = [call for part in parts for call in part.get("tool_calls", ())]
    if calls:
        pieces["tool_calls"] = calls
    if "message" in whole:
        whole["message"] = {"role": "assistant", **pieces}
    else:
        whole |= pieces
    return whole


def comparable(answer: dict[str, Any]) -> dict[str, Any]:
    assert all(isinstance(answer[name], int) and answer[name] >= 0 for name in DURATIONS)
    return {name: value for name, value in answer.items() if name not in (*DURATIONS, "created_at")}


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        (CHAT, {}),
        (CHAT, {"tools": TOOLS}),
        (CHAT, {"options": {"num_predict": 2}}),
        (GENERATE, {"prompt": "hi", "system": "s"}),
        (
            GENERATE,
            {"prompt": "hi", "raw": True, "options": {"stop": ["END"], "num_predict": -1, "top_k": 0}},
        ),
    ],
)
@pytest.mark.parametrize("reply", ["Hello END", f"<think>Hm</think>I add. {CALL}"])
async def test_lines_joined_are_the_answer(
    tokenizer: Tokenizer, config: EngineConfig, route: str, fields: dict[str, Any], reply: str
) -> None:
    body = {**(HI if route == CHAT else {"model": "tiny:latest"}), **fields}
    seen = []
    for size in (1, 4, 100):
        async with app_with(tokenizer, config, reply, tokens_per_message=size) as http:
            response = await http.post(route, json=body)
            assert response.headers["content-type"] == "application/x-ndjson"
            seen.append(comparable(joined(response.text)))
            seen.append(comparable((await http.post(route, json={**body, "stream": False})).json()))
    assert all(one == seen[0] for one in seen)
    assert seen[0]["done_reason"] == ("length" if "num_predict" in str(fields) and route == CHAT else "stop")
    assert seen[0]["eval_count"] > 0 and seen[0]["prompt_eval_count"] > 0
    if "think" in reply and "tools" in fields:
        message = {"role": "assistant", "content": "I add.", "thinking": "Hm"}
        call = {"function": {"name": "add", "arguments": {"a": 1}}}
        assert seen[0]["message"] == {**message, "tool_calls": [call]}


async def test_options_reach_the_core(http: httpx.AsyncClient, client: FakeClient) -> None:
    options = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 4, "num_predict": 8,
        "repeat_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3, "num_ctx": 128,
    }  # fmt: skip
    body = {**HI, "options": options, "keep_alive": "5m", "format": {"type": "object"}}
    assert (await http.post(CHAT, json=body)).status_code == 200
    params, grammar = client.added[-1].params, client.added[-1].grammar
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 7, 0.1)
    assert (params.sampling_seed, params.max_new_tokens, params.repetition_penalty) == (4, 8, 1.1)
    assert (params.presence_penalty, params.frequency_penalty) == (0.2, 0.3)
    assert grammar is not None and json.loads(grammar.source) == {"type": "object"}
    raw = {"model": "tiny", "prompt": "hi", "raw": True, "format": "json"}
    assert (await http.post(GENERATE, json=raw)).status_code == 200
    grammar = client.added[-1].grammar
    assert grammar is not None and grammar.kind == "json_object"


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        (CHAT, {"options": {"num_ctx": 10**6}}, "options.num_ctx"),
        (CHAT, {"options": {"mirostat": 1}}, "options.mirostat"),
        (CHAT, {"options": {"other": 1}}, "options.other"),
        (CHAT, {"options": {"num_predict": 10**6}}, "options.num_predict"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "a", "images": ["x"]}]}, "messages[0].images"),
        (CHAT, {"format": "xml"}, "format"),
        (CHAT, {"keep_alive": True}, "keep_alive"),
        (CHAT, {"think": "much"}, "think"),
        (CHAT, {"model": "other"}, "model"),
        (GENERATE, {"prompt": "a", "suffix": "b"}, "suffix"),
        (GENERATE, {"prompt": "a", "raw": True, "system": "b"}, "system"),
        (GENERATE, {"context": [1]}, "context"),
    ],
)
async def test_refusals_have_the_names_of_this_interface(
    http: httpx.AsyncClient, route: str, fields: dict[str, Any], param: str
) -> None:
    body = {**(HI if route == CHAT else {}), **fields}
    response = await http.post(route, json=body)
    assert response.status_code in (400, 404), response.text
    assert response.json()["param"] == param and isinstance(response.json()["error"], str)


async def test_models(http: httpx.AsyncClient) -> None:
    (card,) = (await http.get("/api/tags")).json()["models"]
    assert card["name"] == "tiny" and len(card["digest"]) == 64
    assert (await http.get("/api/ps")).json()["models"][0]["name"] == "tiny"
    shown = (await http.post("/api/show", json={"model": "tiny"})).json()
    assert shown["capabilities"] == ["completion", "tools", "thinking"] and "messages" in shown["template"]
    assert (await http.post("/api/show", json={"model": "x"})).status_code == 404
    assert "version" in (await http.get("/api/version")).json()
    loaded = (await http.post(GENERATE, json={"model": "tiny"})).json()
    assert (loaded["done"], loaded["done_reason"]) == (True, "load")


async def test_a_call_that_is_cut_off_is_text(tokenizer: Tokenizer, config: EngineConfig) -> None:
    async with app_with(tokenizer, config, CALL[:44]) as http:
        message = (await http.post(CHAT, json={**HI, "tools": TOOLS, "stream": False})).json()["message"]
    assert message == {"role": "assistant", "content": 'add({"a"'}
