"""Tools, reasoning and structured answers of the bundled model, as the official clients see them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import jsonschema
import openai
import pytest

from tests.server.live import Server
from trunkline.config.resolve import SEEDLING

ASK: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOL: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "x", "parameters": SCHEMA},
}
OTHER: Any = {
    "type": "function",
    "function": {"name": "now", "parameters": {"type": "object", "properties": {}}},
}
THINK = {"chat_template_kwargs": {"enable_thinking": True}}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server(SEEDLING, "--served-model-name", "seedling", "--api-key", "k")
    yield server
    code, output = server.stop()
    assert code == 0 and "Traceback" not in output, output


@pytest.fixture
def user(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0)


@pytest.fixture
def claude(server: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="k", max_retries=0)


def streamed(user: openai.OpenAI, **body: Any) -> dict[str, Any]:
    """The message, finish reason and usage of a stream."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "calls": []}
    options = {"include_usage": True}
    for part in user.chat.completions.create(model="seedling", stream=True, stream_options=options, **body):
        message["usage"] = part.usage and part.usage.completion_tokens
        for choice in part.choices:
            message["content"] += choice.delta.content or ""
            message["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            message["finish"] = choice.finish_reason
            for call in choice.delta.tool_calls or []:
                if call.id:
                    assert call.index == len(message["calls"]) and call.function and call.function.name
                    message["calls"].append([call.function.name, ""])
                assert call.function is not None
                message["calls"][call.index][1] += call.function.arguments or ""
    return message


def whole(user: openai.OpenAI, **body: Any) -> dict[str, Any]:
    answer = user.chat.completions.create(model="seedling", **body)
    choice = answer.choices[0]
    return {
        "content": choice.message.content or "",
        "reasoning": getattr(choice.message, "reasoning_content", None) or "",
        "calls": [[call.function.name, call.function.arguments] for call in choice.message.tool_calls or []],
        "finish": choice.finish_reason,
        "usage": answer.usage and answer.usage.completion_tokens,
    }


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [TOOL, OTHER]},
        {"tools": [TOOL, OTHER], "tool_choice": "required", "temperature": 1.5, "seed": 3},
        {"tools": [TOOL, OTHER], "tool_choice": {"type": "function", "function": {"name": "now"}}},
        {"tools": [TOOL], "tool_choice": "required", "extra_body": THINK},
        {"tools": [{**TOOL, "function": {**TOOL["function"], "strict": True}}], "parallel_tool_calls": False},
        {"tools": [TOOL], "tool_choice": "none"},
        {"extra_body": THINK},
        {"extra_body": {**THINK, "max_thinking_tokens": 3}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA}},
         "extra_body": THINK},
        {"response_format": {"type": "json_object"}},
    ],
)  # fmt: skip
def test_openai_streaming_and_not(user: openai.OpenAI, body: dict[str, Any]) -> None:
    body = {"messages": ASK, "max_tokens": 200, "temperature": 0, **body}
    seen = whole(user, **body)
    assert seen == streamed(user, **body)
    if body.get("tool_choice", "none") != "none":
        assert seen["finish"] == "tool_calls" and seen["calls"] and not seen["content"]
        for name, arguments in seen["calls"]:
            jsonschema.validate(
                json.loads(arguments), SCHEMA if name == "get_weather" else {"type": "object"}
            )
    if isinstance(body.get("tool_choice"), dict):
        assert [name for name, _ in seen["calls"]] == ["now"]
    if body.get("response_format", {}).get("type") == "json_schema":
        jsonschema.validate(json.loads(seen["content"]), SCHEMA)
    if "extra_body" in body:
        assert seen["reasoning"] and "think>" not in seen["content"] + seen["reasoning"]
    else:
        assert not seen["reasoning"]


def test_openai_several_answers_with_calls_and_logprobs(user: openai.OpenAI) -> None:
    answer = user.chat.completions.create(
        model="seedling", messages=ASK, max_tokens=200, n=3, temperature=1.0, seed=1, logprobs=True,
        tools=[TOOL], tool_choice="required",
    )  # fmt: skip
    assert len(answer.choices) == 3 and answer.usage is not None
    counted = 0
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls" and choice.message.tool_calls
        assert choice.logprobs is not None and choice.logprobs.content is not None
        counted += len(choice.logprobs.content)
    assert counted == answer.usage.completion_tokens


def test_openai_parses_calls_and_answers(user: openai.OpenAI) -> None:
    """The client's own helpers: strict tools made from a function, and a conversation that goes on."""
    first = user.chat.completions.create(model="seedling", messages=ASK, tools=[TOOL], tool_choice="required")
    calls = first.choices[0].message.tool_calls
    assert calls
    messages = [
        *ASK,
        first.choices[0].message,
        *({"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in calls),
    ]
    second = user.chat.completions.create(model="seedling", messages=messages, tools=[TOOL], max_tokens=60)
    assert second.choices[0].message.content


def test_openai_refusals(user: openai.OpenAI) -> None:
    bad = {"type": "object", "properties": {"a": {"type": "string", "unevaluatedItems": {"a": 1}}}}
    broken = {"type": "function", "function": {"name": "f", "parameters": {**bad, "type": "objekt"}}}
    for body, param in (
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [TOOL, broken], "tool_choice": "required"}, "tools[1].function.parameters"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            user.chat.completions.create(model="seedling", messages=ASK, **body)  # type: ignore[call-overload]
        assert caught.value.param == param


def test_the_formats_in_force_are_told(server: Server) -> None:
    info = server.http.get("/model_info", headers={"authorization": "Bearer k"}).json()
    assert (info["reasoning_parser"], info["tool_call_parser"]) == ("qwen3", "hermes")


# ---------------------------------------------------------------------- anthropic
CLAUDE_TOOL: Any = {"name": "get_weather", "description": "x", "input_schema": SCHEMA}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"tools": [CLAUDE_TOOL], "tool_choice": {"type": "any"}},
        {"tools": [CLAUDE_TOOL], "tool_choice": {"type": "tool", "name": "get_weather"}},
        {"thinking": {"type": "enabled", "budget_tokens": 40}},
        {"system": "Be brief.", "stop_sequences": [" "]},
    ],
)
def test_anthropic_streaming_and_not(claude: anthropic.Anthropic, body: dict[str, Any]) -> None:
    body = {"model": "seedling", "max_tokens": 200, "messages": ASK, "extra_body": {"temperature": 0}, **body}
    answer = claude.messages.create(**body)
    with claude.messages.stream(**body) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"

    def shown(message: Any) -> Any:
        return [block.model_dump(exclude={"id"}) for block in message.content], message.stop_reason

    assert shown(final) == shown(answer) and final.usage.output_tokens == answer.usage.output_tokens
    types = [block.type for block in answer.content]
    if "tools" in body:
        assert set(types) == {"tool_use"} and answer.stop_reason == "tool_use"
        for block in answer.content:
            jsonschema.validate(block.input, SCHEMA)  # type: ignore[union-attr]
    if "thinking" in body:
        assert types[0] == "thinking"
    if "stop_sequences" in body:
        assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", " ")


def test_anthropic_tokens_and_errors(claude: anthropic.Anthropic) -> None:
    count = claude.messages.count_tokens(model="seedling", messages=ASK)
    answer = claude.messages.create(model="seedling", max_tokens=4, messages=ASK)
    usage = answer.usage
    assert count.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(model="seedling", max_tokens=10**4, messages=ASK)
    body: Any = caught.value.body
    assert body["error"]["param"] == "max_tokens" and body["type"] == "error"
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="other", max_tokens=4, messages=ASK)
    with pytest.raises(anthropic.AuthenticationError):
        claude.with_options(api_key="wrong").messages.create(model="seedling", max_tokens=4, messages=ASK)
