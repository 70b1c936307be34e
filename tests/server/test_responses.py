"""/v1/responses: items in and out, the order of events, and what is kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.server.conftest import REPLY, http_client, make_app
from tests.server.fake_client import FakeClient
from trunkline.config.schema import EngineConfig, ServerConfig
from trunkline.server.response_events import Narrator
from trunkline.server.response_store import ResponseStore, Stored
from trunkline.text.tokenizer import Tokenizer

ROUTE = "/v1/responses"
TOOL = {"type": "function", "name": "add", "parameters": {"type": "object"}}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


async def ok(http: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    response = await http.post(ROUTE, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def refused(http: httpx.AsyncClient, body: dict[str, Any], status: int = 400) -> tuple[str, str]:
    response = await http.post(ROUTE, json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    return error["code"], error["param"]


async def streamed(http: httpx.AsyncClient, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = await http.post(ROUTE, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    events = []
    for block in blocks:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def prompt(client: FakeClient, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(client.added[-1].token_ids, skip_special_tokens=False)


# ---------------------------------------------------------------------- shapes
async def test_a_response(http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer) -> None:
    client.cached = 8
    answer = await ok(
        http,
        {
            "model": "tiny",
            "input": "hi",
            "instructions": "Be brief",
            "metadata": {"a": "b"},
            "temperature": 0.5,
        },
    )
    assert prompt(client, tokenizer).startswith(
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nhi"
    )
    assert answer["id"].startswith("resp_") and answer["object"] == "response"
    (message,) = answer["output"]
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": REPLY, "annotations": [], "logprobs": []}],
    }
    assert answer["usage"] == {
        "input_tokens": len(client.added[0].token_ids),
        "input_tokens_details": {"cached_tokens": 8},
        "output_tokens": 23,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": len(client.added[0].token_ids) + 23,
    }
    assert (answer["status"], answer["temperature"], answer["metadata"]) == ("completed", 0.5, {"a": "b"})
    assert answer["instructions"] == "Be brief" and answer["store"] is True


async def test_the_order_of_events(http: httpx.AsyncClient) -> None:
    events = await streamed(http, {"input": "hi", "max_output_tokens": 3})
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added",
        *["output_text.delta"] * deltas,
        "output_text.done", "content_part.done", "output_item.done", "incomplete",
    ]  # fmt: skip
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    text = "".join(event["delta"] for event in events if event["type"].endswith("output_text.delta"))
    last = events[-1]["response"]
    assert deltas >= 2 and last["output"][0]["content"][0]["text"] == text
    assert last["incomplete_details"] == {"reason": "max_output_tokens"} and last["status"] == "incomplete"
    assert events[0]["response"]["output"] == [] and events[0]["response"]["status"] == "in_progress"


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("logprobs", [False, True])
async def test_streaming_equals_not_streaming(
    tools: bool, logprobs: bool, http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer
) -> None:
    client.script = lambda request: tokenizer.encode(f"Well. {CALL}{CALL} Done." if tools else REPLY)
    body: dict[str, Any] = {"input": "hi", "tools": [TOOL] if tools else []}
    if logprobs:
        body |= {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = await ok(http, body)
    last = (await streamed(http, body))[-1]["response"]

    def without_ids(answer: dict[str, Any]) -> list[dict[str, Any]]:
        return [{**item, "id": "", "call_id": ""} for item in answer["output"]]

    assert without_ids(last) == without_ids(whole) and last["usage"] == whole["usage"]
    assert bool(whole["output"][0]["content"][0]["logprobs"]) == logprobs
    if tools:
        kinds = [item["type"] for item in whole["output"]]
        assert kinds[:3] == ["message", "function_call", "function_call"]
        assert whole["output"][1]["name"] == "add" and json.loads(whole["output"][1]["arguments"]) == {"a": 1}


async def test_a_tool_call_and_its_output(
    http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer
) -> None:
    client.script = lambda request: tokenizer.encode(CALL)
    first = await ok(http, {"input": "1 + 1?", "tools": [TOOL]})
    (call,) = first["output"]
    client.script = lambda request: tokenizer.encode("2")
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "two"}
    chained = await ok(http, {"input": [output], "previous_response_id": first["id"], "tools": [TOOL]})
    by_chain = prompt(client, tokenizer)
    assert "<|im_start|>tool\ntwo<|im_end|>" in by_chain and chained["previous_response_id"] == first["id"]
    for again in (call, {"type": "item_reference", "id": call["id"]}):
        items = [{"role": "user", "content": [{"type": "input_text", "text": "1 + 1?"}]}, again, output]
        await ok(http, {"input": items, "tools": [TOOL]})
        assert prompt(client, tokenizer) == by_chain


def test_reasoning_and_pieces_of_calls_become_items() -> None:
    """As a chat stream with reasoning and arguments in pieces tells them."""
    response: dict[str, Any] = {"id": "r", "output": [], "status": "in_progress", "usage": None}
    narrator = Narrator(response)
    head = {"index": 0, "id": "call_1", "function": {"name": "f", "arguments": ""}}
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "Let me "},
        {"reasoning_content": "see."},
        {"content": "So: "},
        {"tool_calls": [head]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
    ]
    events = list(narrator.begin())
    for delta in deltas:
        events += narrator.take({"choices": [{"delta": delta, "finish_reason": None, "logprobs": None}]})
    events += narrator.take({"choices": [{"delta": {}, "finish_reason": "tool_calls", "logprobs": None}]})
    events += narrator.end()
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert [event.get("output_index") for event in events[2:-1]] == [0] * 7 + [1] * 6 + [2] * 5
    reasoning, message, call = response["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Let me see."}]
    assert message["content"][0]["text"] == "So: "
    assert (call["call_id"], call["name"], call["arguments"]) == ("call_1", "f", '{"a": 1}')
    assert response["status"] == "completed"


async def test_a_call_that_is_asked_for(
    http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer
) -> None:
    client.script = lambda request: tokenizer.encode(CALL)
    for choice in ("required", {"type": "function", "name": "add"}):
        events = await streamed(http, {"input": "1 + 1?", "tools": [TOOL], "tool_choice": choice})
        assert client.added[-1].grammar is not None
        response = events[-1]["response"]
        (call,) = response["output"]
        assert call["name"] == "add" and json.loads(call["arguments"]) == {"a": 1}
        assert response["tool_choice"] == choice and response["tools"] == [TOOL]
        deltas = [event["delta"] for event in events if event["type"].endswith("arguments.delta")]
        assert "".join(deltas) == call["arguments"]
    body = {"input": "a", "tools": [TOOL], "tool_choice": {"type": "function", "name": "other"}}
    assert (await refused(http, body))[1] == "tool_choice"


async def test_reasoning(http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer) -> None:
    client.script = lambda request: tokenizer.encode("Let me see.</think>Hello")
    body = {"input": "hi", "chat_template_kwargs": {"enable_thinking": True}}
    answer = await ok(http, body)
    reasoning, message = answer["output"]
    assert reasoning["type"] == "reasoning" and reasoning["status"] == "completed"
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Let me see."}]
    assert message["content"][0]["text"] == "Hello"
    assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    last = (await streamed(http, body))[-1]["response"]
    assert [item["content"] for item in last["output"]] == [item["content"] for item in answer["output"]]
    again = {"input": [*answer["output"], {"role": "user", "content": "go on"}]}
    await ok(http, again)  # a template that does not show reasoning is given it all the same
    assert "Hello<|im_end|>" in prompt(client, tokenizer)


async def test_structured_output(http: httpx.AsyncClient, client: FakeClient) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    answer = await ok(http, {"input": "hi", "text": {"format": form}})
    grammar = client.added[-1].grammar
    assert grammar is not None and json.loads(grammar.source) == schema
    assert answer["text"]["format"] == form
    await ok(http, {"input": "hi", "text": {"format": {"type": "json_object"}}})
    assert client.added[-1].grammar is not None


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, ("missing_field", "input")),
        ({"input": []}, ("out_of_range", "input")),
        ({"input": 5}, ("invalid_type", "input")),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, ("unsupported_field", "input[0].type")),
        ({"input": [{"role": "user"}]}, ("missing_field", "input[0].content")),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            ("unsupported_field", "input[0].content[0].type"),
        ),
        ({"input": [{"type": "item_reference", "id": "nope"}]}, ("not_found", "input[0].id")),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "["}]},
            ("invalid_value", "input[0].tool_calls[0].function.arguments"),
        ),
        ({"input": "a", "background": True, "stream": True}, ("invalid_value", "background")),
        ({"input": "a", "tools": [{"type": "web_search"}]}, ("invalid_value", "tools[0].type")),
        ({"input": "a", "truncation": "auto"}, ("unsupported_field", "truncation")),
        ({"input": "a", "include": ["file_search_call.results"]}, ("invalid_value", "include[0]")),
        ({"input": "a", "text": {"format": {"type": "xml"}}}, ("invalid_value", "text.format.type")),
        ({"input": "a", "metadata": {"a": 1}}, ("invalid_type", "metadata.a")),
        ({"input": "a", "metadata": {str(i): "" for i in range(17)}}, ("out_of_range", "metadata")),
        ({"input": "a", "reasoning": {"effort": "high"}}, ("unsupported_field", "reasoning.effort")),
        ({"input": "a " * 900}, ("context_length_exceeded", "input")),
        ({"input": "a", "max_output_tokens": 5000}, ("context_length_exceeded", "max_output_tokens")),
        ({"input": "a", "conversation": "c"}, ("unsupported_field", "conversation")),
    ],
)
async def test_refusals(http: httpx.AsyncClient, body: dict[str, Any], expected: tuple[str, str]) -> None:
    assert await refused(http, body) == expected


async def test_an_unknown_predecessor(http: httpx.AsyncClient) -> None:
    body = {"input": "a", "previous_response_id": "resp_x"}
    assert await refused(http, body, 404) == ("response_not_found", "previous_response_id")


async def test_a_full_server_has_a_status_of_its_own(http: httpx.AsyncClient, client: FakeClient) -> None:
    from trunkline.types import FinishReason

    client.refusal = FinishReason("abort", message="full", code="queue_full", status=429)
    assert (await http.post(ROUTE, json={"input": "a", "stream": True})).status_code == 429


async def test_a_death_on_the_way_is_told(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.dies_after = 2
    events = await streamed(http, {"input": "a"})
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"]["code"] == "engine_dead"
    assert events[-2]["type"] == "response.output_item.done" and events[-2]["item"]["status"] == "incomplete"
    stored = (await http.get(f"{ROUTE}/{events[0]['response']['id']}")).json()
    assert stored["status"] == "failed"


# ---------------------------------------------------------------------- what is kept
async def test_get_items_delete(http: httpx.AsyncClient) -> None:
    items = [{"role": "user", "content": f"line {i}"} for i in range(3)]
    answer = await ok(http, {"input": items})
    path = f"{ROUTE}/{answer['id']}"
    assert (await http.get(path)).json() == answer
    listed = (await http.get(f"{path}/input_items", params={"order": "asc", "limit": 2})).json()
    assert [item["content"][0]["text"] for item in listed["data"]] == ["line 0", "line 1"]
    assert listed["has_more"] and listed["last_id"] == listed["data"][1]["id"]
    rest = await http.get(f"{path}/input_items", params={"order": "asc", "after": listed["last_id"]})
    assert [item["content"][0]["text"] for item in rest.json()["data"]] == ["line 2"]
    assert (await http.get(f"{path}/input_items", params={"after": "nope"})).status_code == 400
    assert (await http.post(f"{path}/cancel")).json()["error"]["code"] == "not_cancellable"
    deleted = (await http.delete(path)).json()
    assert deleted == {"id": answer["id"], "object": "response", "deleted": True}
    for response in (await http.get(path), await http.delete(path), await http.get(f"{path}/input_items")):
        assert response.status_code == 404 and response.json()["error"]["code"] == "response_not_found"


async def test_what_is_not_to_be_stored_is_not(http: httpx.AsyncClient) -> None:
    answer = await ok(http, {"input": "hi", "store": False})
    assert answer["store"] is False and (await http.get(f"{ROUTE}/{answer['id']}")).status_code == 404


async def test_a_server_that_stores_nothing(
    client: FakeClient, tokenizer: Tokenizer, config: EngineConfig
) -> None:
    plain = EngineConfig(model=config.model, server=ServerConfig(response_store_bytes=0))
    async with http_client(make_app(client, tokenizer, plain)) as http:
        assert (await ok(http, {"input": "hi"}))["store"] is False
        assert await refused(http, {"input": "hi", "store": True}) == ("unsupported_field", "store")
        assert await refused(http, {"input": "hi", "background": True}) == ("invalid_value", "background")


def test_the_store_is_bounded_and_forgets_the_oldest() -> None:
    def entry(key: str, text: str = "") -> Stored:
        return Stored({"id": key, "output": [], "text": text}, [], [])

    store = ResponseStore(3, 1000)
    for key in "abc":
        store.put(entry(key))
    assert store.get("a") is not None  # used: younger than b now
    store.put(entry("d"))
    assert [key for key in "abcd" if store.get(key)] == ["a", "c", "d"]
    store.put(entry("e", "x" * 930))
    assert len(store) == 1 and store.num_bytes <= 1000
    store.put(entry("f", "x" * 2000))
    assert len(store) == 0 and store.num_bytes == 0
    store.put(entry("g"))
    size = store.num_bytes
    store.put(entry("g"))
    assert store.num_bytes == size and store.delete("g") and not store.delete("g") and store.num_bytes == 0


# ---------------------------------------------------------------------- in the background, and cancelled
@pytest.fixture
async def slow(client: FakeClient, http: httpx.AsyncClient) -> AsyncIterator[httpx.AsyncClient]:
    client.delay = 0.01
    yield http


async def until(http: httpx.AsyncClient, key: str, *statuses: str) -> dict[str, Any]:
    for _ in range(500):
        answer: dict[str, Any] = (await http.get(f"{ROUTE}/{key}")).json()
        if answer.get("status") in statuses:
            return answer
        await asyncio.sleep(0.01)
    raise AssertionError(f"{answer} is none of {statuses}")


async def test_in_the_background(slow: httpx.AsyncClient) -> None:
    answer = await ok(slow, {"input": "hi", "background": True})
    assert (answer["status"], answer["background"], answer["output"]) == ("queued", True, [])
    body = {"input": "go on", "previous_response_id": answer["id"]}
    assert await refused(slow, body) == ("response_running", "previous_response_id")
    assert (await slow.delete(f"{ROUTE}/{answer['id']}")).status_code == 409
    done = await until(slow, answer["id"], "completed", "failed")
    assert done["output"][0]["content"][0]["text"] == REPLY and done["usage"]["output_tokens"] == 23
    await ok(slow, body)


async def test_cancel(slow: httpx.AsyncClient, client: FakeClient) -> None:
    answer = await ok(slow, {"input": "hi", "background": True})
    await until(slow, answer["id"], "in_progress")
    cancelled = (await slow.post(f"{ROUTE}/{answer['id']}/cancel")).json()
    assert cancelled["status"] == "cancelled"
    for _ in range(300):
        if not client.live:
            break
        await asyncio.sleep(0.01)
    assert not client.live
    assert (await slow.get(f"{ROUTE}/{answer['id']}")).json()["status"] == "cancelled"


async def test_a_client_that_leaves_cancels(slow: httpx.AsyncClient, client: FakeClient) -> None:
    asking = asyncio.create_task(slow.post(ROUTE, json={"input": "hi"}))
    while not client.live:
        await asyncio.sleep(0.005)
    (key,) = client.live
    await until(slow, key, "in_progress")
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert (await until(slow, key, "cancelled"))["status"] == "cancelled"
