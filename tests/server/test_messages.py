"""Anthropic's interface: translation, events, errors; a stream joined is the whole answer (P3)."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.server.conftest import http_client, make_app, with_key
from tests.server.fake_client import FakeClient
from trunkline.config.schema import EngineConfig
from trunkline.text.tokenizer import Tokenizer

ROUTE = "/v1/messages"
HI: dict[str, Any] = {"max_tokens": 200, "messages": [{"role": "user", "content": "hi"}]}
TOOLS = [{"name": "add", "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}]
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


def app_with(tokenizer: Tokenizer, config: EngineConfig, reply: str, **more: Any) -> httpx.AsyncClient:
    tokens = tokenizer.encode(reply)
    return http_client(
        make_app(FakeClient(lambda _: tokens, eos=2, vocab_size=400, **more), tokenizer, config)
    )


def events_of(text: str) -> list[dict[str, Any]]:
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    events = []
    for block in blocks:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What a client makes of a stream, written apart from the server's own joining."""
    message = events[0]["message"]
    open_blocks: set[int] = set()
    for event in events[1:]:
        if event["type"] == "content_block_start":
            assert event["index"] == len(message["content"]) and not open_blocks
            open_blocks.add(event["index"])
            message["content"].append({**event["content_block"], "json": ""})
        elif event["type"] == "content_block_delta":
            assert event["index"] in open_blocks
            block, delta = message["content"][event["index"]], event["delta"]
            for name, text in delta.items():
                if name != "type":
                    block["json" if name == "partial_json" else name] += text
        elif event["type"] == "content_block_stop":
            open_blocks.remove(event["index"])
        elif event["type"] == "message_delta":
            message |= event["delta"] | {"usage": event["usage"]}
    for block in message["content"]:
        text = block.pop("json")
        if block["type"] == "tool_use" and text:
            block["input"] = json.loads(text)
    return message


def comparable(message: dict[str, Any]) -> dict[str, Any]:
    content = [{**block, "id": "id" in block} for block in message["content"]]
    return {**message, "id": "", "content": content}


@pytest.mark.parametrize(
    ("reply", "fields", "kinds", "reason"),
    [
        ("Hello there.", {}, ["text"], "end_turn"),
        (f"I add. {CALL}\n{CALL}", {"tools": TOOLS}, ["text", "tool_use", "tool_use"], "tool_use"),
        ("<think>Hm</think>Yes END no", {"stop_sequences": ["END"]}, ["thinking", "text"], "stop_sequence"),
        ("Hello there, world", {"max_tokens": 3}, ["text"], "max_tokens"),
        ("", {}, [], "end_turn"),
    ],
)
async def test_a_stream_joined_is_the_answer(
    tokenizer: Tokenizer,
    config: EngineConfig,
    reply: str,
    fields: dict[str, Any],
    kinds: list[str],
    reason: str,
) -> None:
    seen = []
    for size in (1, 3, 100):
        async with app_with(tokenizer, config, reply, tokens_per_message=size, cached=8) as http:
            whole = (await http.post(ROUTE, json={**HI, **fields})).json()
            response = await http.post(ROUTE, json={**HI, **fields, "stream": True})
            assert response.headers["content-type"].startswith("text/event-stream")
            events = events_of(response.text)
            assert [event["type"] for event in events[:2]] == ["message_start", "ping"]
            assert events[-1] == {"type": "message_stop"}
            seen += [comparable(whole), comparable(joined(events))]
    assert all(one == seen[0] for one in seen)
    assert [block["type"] for block in seen[0]["content"]] == kinds
    assert seen[0]["stop_reason"] == reason
    assert seen[0]["stop_sequence"] == ("END" if reason == "stop_sequence" else None)
    usage = seen[0]["usage"]
    assert usage["cache_read_input_tokens"] == 8
    assert usage["input_tokens"] == 21 - 8 or "tools" in fields


async def test_conversations_reach_the_template(
    http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer
) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "t", "signature": ""},
                {"type": "text", "text": "b"},
                {"type": "tool_use", "id": "1", "name": "add", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "7"}]},
                {"type": "tool_result", "tool_use_id": "2", "content": "bad", "is_error": True},
                {
                    "type": "search_result",
                    "title": "T",
                    "source": "S",
                    "content": [{"type": "text", "text": "x"}],
                },
            ],
        },
        {"role": "assistant", "content": "It is"},
    ]
    body = {**HI, "messages": messages, "system": [{"type": "text", "text": "s"}], "tools": TOOLS}
    assert (await http.post(ROUTE, json=body)).status_code == 200
    prompt = tokenizer.decode(client.added[-1].token_ids, skip_special_tokens=False)
    shown = prompt[prompt.index("<|im_start|>system") :]
    assert shown == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>tool\n7<|im_end|>\n<|im_start|>tool\nError: bad<|im_end|>\n"
        "<|im_start|>user\nT\nS\nx<|im_end|>\n<|im_start|>assistant\nIt is"
    )
    count = (
        await http.post(f"{ROUTE}/count_tokens", json={k: v for k, v in body.items() if k != "max_tokens"})
    ).json()
    assert count == {"input_tokens": len(client.added[-1].token_ids)}


async def test_choices_and_thinking_reach_the_core(http: httpx.AsyncClient, client: FakeClient) -> None:
    for choice, words in (
        ({"type": "any"}, "tags_with_separator"),
        ({"type": "tool", "name": "add", "disable_parallel_tool_use": True}, '"stop_after_first": true'),
        ({"type": "auto", "disable_parallel_tool_use": True}, "triggered_tags"),
    ):
        assert (await http.post(ROUTE, json={**HI, "tools": TOOLS, "tool_choice": choice})).status_code == 200
        grammar = client.added[-1].grammar
        assert grammar is not None and words in grammar.source
    thinking = {"type": "enabled", "budget_tokens": 12}
    assert (await http.post(ROUTE, json={**HI, "thinking": thinking})).status_code == 200
    limits = client.added[-1].thinking
    assert limits is not None and limits.max_tokens == 12
    schema = {"type": "object", "properties": {}}
    form = {"format": {"type": "json_schema", "schema": schema}}
    assert (await http.post(ROUTE, json={**HI, "output_config": form})).status_code == 200
    grammar = client.added[-1].grammar
    assert grammar is not None and json.loads(grammar.source) == schema


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "1"}]}]},
         "messages[0].content[0].type"),
        ({"tools": [{"name": "add"}]}, "tools[0].input_schema"),
        ({"tools": [*TOOLS, *TOOLS]}, "tools[1].name"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"unknown": 1}, "unknown"),
    ],
)  # fmt: skip
async def test_refusals_have_the_names_of_this_interface(
    http: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    response = await http.post(ROUTE, json={**HI, **fields})
    body = response.json()
    assert response.status_code == 400 and body["type"] == "error", body
    assert body["error"]["type"] == "invalid_request_error" and body["error"]["param"] == param


async def test_errors_have_an_envelope_of_their_own(
    client: FakeClient, tokenizer: Tokenizer, config: EngineConfig
) -> None:
    async with http_client(make_app(client, tokenizer, with_key(config, "secret"))) as http:
        response = await http.post(ROUTE, json=HI)
        assert (response.status_code, response.json()["error"]["type"]) == (401, "authentication_error")
        assert (await http.post(ROUTE, json=HI, headers={"x-api-key": "secret"})).status_code == 200
        response = await http.post(ROUTE, content=b"{", headers={"x-api-key": "secret"})
        assert response.json()["type"] == "error"
        response = await http.post(ROUTE, json={**HI, "model": "x"}, headers={"x-api-key": "secret"})
        assert response.json()["error"]["type"] == "not_found_error"


async def test_a_stream_that_fails_ends_with_an_error(tokenizer: Tokenizer, config: EngineConfig) -> None:
    async with app_with(tokenizer, config, "Hello there.", dies_after=2) as http:
        events = events_of((await http.post(ROUTE, json={**HI, "stream": True})).text)
    assert events[0]["type"] == "message_start"
    assert (events[-1]["type"], events[-1]["error"]["type"]) == ("error", "overloaded_error")


async def test_a_call_that_is_cut_off_loses_nothing(tokenizer: Tokenizer, config: EngineConfig) -> None:
    async with app_with(tokenizer, config, CALL[:44]) as http:
        message = (await http.post(ROUTE, json={**HI, "tools": TOOLS})).json()
    (block,) = message["content"]
    assert (block["input"], block["partial_json"]) == ({}, '{"a"')
