"""Every field of every route x {accepted, null, unsupported, out of range, wrong type, unknown} (P1, P2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest

from trunkline.engine.constraint import GRAMMAR_FIELDS, MAX_SOURCE, JsonText, ResponseFormat
from trunkline.engine.fields import (
    SAMPLING_FIELDS,
    Flag,
    Items,
    LogitBias,
    Number,
    Object,
    OneOf,
    Rule,
    Text,
    Unsupported,
)
from trunkline.engine.native import GENERATE_FIELDS, PerPrompt, Prompts
from trunkline.engine.scoring import SCORE_FIELDS
from trunkline.engine.vectors import ENCODE_FIELDS
from trunkline.server.fields import ABORT_FIELDS, CHAT_FIELDS, COMPLETION_FIELDS, ToolChoice
from trunkline.server.scores import RERANK_FIELDS
from trunkline.server.vectors import EMBEDDING_FIELDS

ROUTES: dict[str, tuple[Mapping[str, Rule], dict[str, Any]]] = {
    "/v1/chat/completions": (CHAT_FIELDS, {"messages": [{"role": "user", "content": "hi"}]}),
    "/v1/completions": (COMPLETION_FIELDS, {"prompt": "hi"}),
    "/generate": (GENERATE_FIELDS, {"text": "hi"}),
    "/v1/embeddings": (EMBEDDING_FIELDS, {"input": "hi"}),
    "/encode": (ENCODE_FIELDS, {"text": "hi"}),
    "/v1/score": (SCORE_FIELDS, {"query": "hi", "items": ["a"], "label_token_ids": [5]}),
    "/v1/rerank": (RERANK_FIELDS, {"query": "hi", "documents": ["a"]}),
}
GOOD: dict[str, Any] = {  # for fields whose accepted values a rule does not show
    "stream_options": {"include_usage": True},
    "sampling_params": {"temperature": 0.5},
    "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "chat_template_kwargs": {"enable_thinking": True},
    "model": "tiny",
    "stop": ["x", "y"],
    "stop_regex": ["x+y"],
    "documents": ["a"],
    "encoding_format": "base64",
    "logit_bias": {"5": -3.5},
    "response_format": {"type": "json_object"},
}  # fmt: skip
NEEDS: dict[str, dict[str, Any]] = {  # other fields that a field goes with
    "stream_options": {"stream": True},
    "top_logprobs": {"logprobs": True},
    "top_logprobs_num": {"return_logprob": True},
    "token_ids_logprob": {"return_logprob": True},
}
REQUIRED = {"messages", "prompt", "text", "input", "query", "items", "documents", "label_token_ids"}
NOT_BY_ITSELF = {"instruct", "text", "input_ids", "reasoning_effort", "max_thinking_tokens"}  # tested apart
NOT_BY_ITSELF |= {"session_params", "session_id"}  # in test_sessions.py


def wrong_types(rule: Rule) -> list[Any]:
    match rule:
        case PerPrompt():
            return wrong_types(rule.of)
        case Number(integer=True):
            return ["1", 1.5, True, [], {}]
        case Number():
            return ["1", True, [], {}]
        case Text() | OneOf() | ToolChoice():
            return [1, True, []]
        case Flag():
            return ["true", 1, []]
        case JsonText():
            return [1, True, []]
        case ResponseFormat():
            return [1, "json_object", []]
        case Object() | LogitBias():
            return ["a", 1, [1]]
        case Items():
            return [True, {"a": 1}, 1.5]
        case Prompts():
            return [1, True, {}, [], [1.5], ["a", 1], [[]]]
    raise AssertionError(f"no wrong types for {rule}")


def out_of_range(rule: Rule) -> list[Any]:
    match rule:
        case PerPrompt():
            return out_of_range(rule.of)
        case Number():
            step = 1 if rule.integer else 0.001
            outside = [] if abs(rule.low) == float("inf") else [rule.low - step]
            outside += [] if abs(rule.high) == float("inf") else [rule.high + step, 10**30]
            outside += [rule.low] if rule.above else []
            outside = [int(value) if rule.integer else value for value in outside]
            return [value for value in outside if value not in rule.also]
        case Text():
            return ["x" * (rule.longest + 1)] if rule.longest < 10_000 else []
        case Items():
            return [[1] * (rule.most + 1)] if rule.most < 100_000 else []
        case LogitBias():
            return [{"5": 101}, {str(i): 0 for i in range(1025)}]
    return []


def good(rule: Rule, name: str) -> Any:
    if name in GOOD:
        return GOOD[name]
    match rule:
        case PerPrompt():
            return good(rule.of, name)
        case Number():
            return int(max(rule.low, 0)) + (1 if rule.above or rule.low < 1 < rule.high else 0)
        case Text() | JsonText():
            return "abc"
        case Flag():
            return False
        case Items():
            return [5]
        case Prompts():
            return "hi" if rule.texts else [1, 2]
        case ToolChoice():
            return "auto"
    raise AssertionError(f"no good value for {rule}")


def cases() -> Iterator[tuple[str, str, Rule]]:
    for route, (table, _) in ROUTES.items():
        for name, rule in table.items():
            yield route, name, rule


def sampling_cases() -> Iterator[tuple[str, str, Rule]]:
    for name, rule in {**SAMPLING_FIELDS, **GRAMMAR_FIELDS}.items():
        yield "/generate", f"sampling_params.{name}", rule


ALL = [*cases(), *sampling_cases()]
BUILT = [case for case in ALL if not isinstance(case[2], Unsupported)]


async def post(http: httpx.AsyncClient, route: str, name: str, value: Any) -> httpx.Response:
    body = {**ROUTES[route][1], **NEEDS.get(name, {})}
    if name.startswith("sampling_params."):
        body["sampling_params"] = {name.removeprefix("sampling_params."): value}
    else:
        body[name] = value
    return await http.post(route, json=body)


def assert_refused(response: httpx.Response, code: str, param: str) -> None:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["code"] == code
    assert error["param"] == param or error["param"].startswith((f"{param}[", f"{param}."))
    assert error["type"] == "invalid_request_error" and error["message"]


@pytest.mark.parametrize(("route", "name", "rule"), ALL)
async def test_null_means_not_given(http: httpx.AsyncClient, route: str, name: str, rule: Rule) -> None:
    if name not in REQUIRED:
        response = await post(http, route, name, None)
        assert response.status_code == 200, response.text


@pytest.mark.parametrize(("route", "name", "rule"), [c for c in BUILT if c[1] not in NOT_BY_ITSELF])
async def test_good_values_are_accepted(http: httpx.AsyncClient, route: str, name: str, rule: Rule) -> None:
    value = good(rule, name.removeprefix("sampling_params."))
    response = await post(http, route, name, value)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(("route", "name", "rule"), BUILT)
async def test_wrong_types_are_named(http: httpx.AsyncClient, route: str, name: str, rule: Rule) -> None:
    for value in wrong_types(rule):
        assert_refused(await post(http, route, name, value), "invalid_type", name)


@pytest.mark.parametrize(("route", "name", "rule"), [case for case in BUILT if out_of_range(case[2])])
async def test_out_of_range_is_named(http: httpx.AsyncClient, route: str, name: str, rule: Rule) -> None:
    for value in out_of_range(rule):
        assert_refused(await post(http, route, name, value), "out_of_range", name)


@pytest.mark.parametrize(
    ("route", "name", "rule"), [case for case in ALL if isinstance(case[2], Unsupported)]
)
async def test_unsupported_fields(http: httpx.AsyncClient, route: str, name: str, rule: Unsupported) -> None:
    for value in ("x", 12345, ["x"], {"type": "json_object"}, True, False):
        if not any(value == neutral and type(value) is type(neutral) for neutral in rule.neutral):
            assert_refused(await post(http, route, name, value), "unsupported_field", name)
    for value in rule.neutral:
        response = await post(http, route, name, value)
        assert response.status_code == 200, response.text


@pytest.mark.parametrize("route", ROUTES)
async def test_unknown_fields(http: httpx.AsyncClient, route: str) -> None:
    assert_refused(await post(http, route, "temprature", 1), "unknown_field", "temprature")
    nested = next((name for name in ("sampling_params", "stream_options") if name in ROUTES[route][0]), None)
    if nested is None or isinstance(ROUTES[route][0][nested], Unsupported):
        return
    response = await post(http, route, nested, {"nope": 1})
    assert_refused(response, "unknown_field", f"{nested}.nope")


BAD_MESSAGES: list[tuple[Any, str, str]] = [
    ([], "out_of_range", "messages"),
    (["hi"], "invalid_type", "messages[0]"),
    ([{"content": "x"}], "missing_field", "messages[0].role"),
    ([{"role": "user"}], "missing_field", "messages[0].content"),
    ([{"role": "god", "content": "x"}], "invalid_value", "messages[0].role"),
    ([{"role": "user", "content": 3}], "invalid_type", "messages[0].content"),
    ([{"role": "user", "content": [{"text": "x"}]}], "invalid_type", "messages[0].content[0]"),
    ([{"role": "user", "content": "x", "colour": 1}], "unknown_field", "messages[0].colour"),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        "unsupported_field",
        "messages[0].content[0].type",
    ),
    (
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}],
        "invalid_value",
        "messages[0].tool_calls[0].function.arguments",
    ),
    (
        [{"role": "assistant", "tool_calls": [{"function": {}}]}],
        "missing_field",
        "messages[0].tool_calls[0].function.name",
    ),
]


@pytest.mark.parametrize(("messages", "code", "param"), BAD_MESSAGES)
async def test_bad_messages(http: httpx.AsyncClient, messages: Any, code: str, param: str) -> None:
    response = await http.post("/v1/chat/completions", json={"messages": messages})
    assert_refused(response, code, param)


CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MAX_NEW, MIN_NEW = "sampling_params.max_new_tokens", "sampling_params.min_new_tokens"
REGEX = "sampling_params.regex"
SCHEMA = "response_format.json_schema"
LOGPROB, SAMPLING_N = {"return_logprob": True}, "sampling_params.n"
RELATED: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, {"top_logprobs": 3}, "invalid_value", "top_logprobs"),
    (CHAT, {"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
    (CHAT, {"max_tokens": 3, "max_completion_tokens": 4}, "invalid_value", "max_tokens"),
    (CHAT, {"continue_final_message": True}, "invalid_value", "continue_final_message"),
    (CHAT, {"reasoning_effort": "high"}, "unsupported_field", "reasoning_effort"),
    (CHAT, {"tool_choice": "required"}, "invalid_value", "tool_choice"),
    (
        CHAT,
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        "invalid_value",
        "tool_choice",
    ),
    (
        CHAT,
        {"chat_template_kwargs": {"thinkin": 1}},
        "unsupported_field",
        "chat_template_kwargs.thinkin",
    ),
    (CHAT, {"max_tokens": 600}, "context_length_exceeded", "max_tokens"),
    (CHAT, {"max_completion_tokens": 600}, "context_length_exceeded", "max_completion_tokens"),
    (CHAT, {"min_tokens": 600}, "min_tokens_too_large", "min_tokens"),
    (COMPLETIONS, {"max_tokens": 600}, "context_length_exceeded", "max_tokens"),
    (COMPLETIONS, {"prompt": "hi " * 600}, "context_length_exceeded", "prompt"),
    (COMPLETIONS, {"prompt": ""}, "empty_prompt", "prompt"),
    (COMPLETIONS, {"prompt": [100_000]}, "token_out_of_range", "prompt"),
    (COMPLETIONS, {"logit_bias": {"100000": 1}}, "token_out_of_range", "logit_bias"),
    (COMPLETIONS, {"logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
    (COMPLETIONS, {"stop_token_ids": [100_000]}, "token_out_of_range", "stop_token_ids"),
    (COMPLETIONS, {"n": 21, "prompt": "hi " * 600}, "too_many_completions", "n"),
    ("/generate", {"text": "hi", "input_ids": [1]}, "invalid_value", "text"),
    ("/generate", {"text": "hi " * 600}, "context_length_exceeded", "text"),
    ("/generate", {"text": None, "input_ids": [9999]}, "token_out_of_range", "input_ids"),
    ("/generate", {"text": None}, "invalid_value", "text"),
    ("/generate", {"sampling_params": {"max_new_tokens": 600}}, "context_length_exceeded", MAX_NEW),
    ("/generate", {"sampling_params": {"min_new_tokens": 600}}, "min_tokens_too_large", MIN_NEW),
    ("/generate", {"top_logprobs_num": 2}, "invalid_value", "top_logprobs_num"),
    ("/generate", {**LOGPROB, "logprob_start_len": 9}, "logprob_start_out_of_range", "logprob_start_len"),
    ("/generate", {**LOGPROB, "token_ids_logprob": [9999]}, "token_out_of_range", "token_ids_logprob"),
    (CHAT, {"response_format": {"type": "json"}}, "invalid_value", "response_format.type"),
    (CHAT, {"response_format": {"type": "json_object", "a": 1}}, "unknown_field", "response_format.a"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "missing_field", f"{SCHEMA}.schema"),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"x": 1}}},
        "unknown_field",
        f"{SCHEMA}.x",
    ),
    (CHAT, {"response_format": {"type": "json_object"}, "regex": "a"}, "invalid_value", "response_format"),
    (CHAT, {"max_thinking_tokens": 3}, "invalid_value", "max_thinking_tokens"),
    (COMPLETIONS, {"regex": "a", "ebnf": "b"}, "invalid_value", "ebnf"),
    (COMPLETIONS, {"regex": "a" * (MAX_SOURCE + 1)}, "out_of_range", "regex"),
    ("/generate", {"sampling_params": {"regex": "a", "json_schema": {}}}, "invalid_value", REGEX),
    ("/generate", {"max_thinking_tokens": 3}, "invalid_value", "max_thinking_tokens"),
    ("/generate", {"text": ["a", "b"], "rid": ["x"]}, "length_mismatch", "rid"),
    ("/generate", {"text": ["a", "b"], "rid": ["x", "x"]}, "duplicate_rid", "rid"),
    ("/generate", {"text": ["a", "b"], "sampling_params": [{"n": 2}, {}]}, "invalid_value", SAMPLING_N),
]  # fmt: skip


@pytest.mark.parametrize(("route", "fields", "code", "param"), RELATED)
async def test_fields_that_do_not_go_together(
    http: httpx.AsyncClient, route: str, fields: dict[str, Any], code: str, param: str
) -> None:
    response = await http.post(route, json={**ROUTES[route][1], **fields})
    assert_refused(response, code, param)


async def test_messages_tell_the_numbers(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 600})
    assert response.json()["error"]["message"] == (
        "the prompt has 2 tokens and max_tokens is 600, together 602; the context length is 512: "
        "ask for at most 510"
    )
    response = await http.post("/v1/completions", json={"prompt": "hi", "temperature": -1})
    assert response.json()["error"]["message"] == "temperature is -1; it must be finite and at least 0"


async def test_another_model_is_not_found(http: httpx.AsyncClient) -> None:
    for route, (_, body) in ROUTES.items():
        if route.startswith("/v1"):
            response = await http.post(route, json={**body, "model": "gpt-9"})
            assert response.status_code == 404
            assert response.json()["error"]["code"] == "model_not_found"
    assert (await http.get("/v1/models/gpt-9")).status_code == 404
    assert (await http.get("/v1/models/tiny")).json()["id"] == "tiny"


@pytest.mark.parametrize(
    ("body", "code"), [({}, "missing_field"), ({"rid": 3}, "invalid_type"), ({"abort": 1}, "unknown_field")]
)
async def test_abort_fields(http: httpx.AsyncClient, body: dict[str, Any], code: str) -> None:
    response = await http.post("/abort_request", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, code)
    assert set(ABORT_FIELDS) == {"rid", "abort_all", "abort_message"}


def test_every_field_of_the_reference_is_known() -> None:
    """The chat extensions that SGLang's clients send: each is honoured or refused by name."""
    extensions = """
        top_k min_p min_tokens regex ebnf repetition_penalty stop_token_ids stop_regex no_stop_trim ignore_eos
        continue_final_message skip_special_tokens lora_path session_id session_params separate_reasoning
        stream_reasoning chat_template_kwargs custom_logit_processor custom_params input_ids rid extra_key
        cache_salt priority return_hidden_states return_routed_experts return_cached_tokens_details
        return_spec_tokens_details return_meta_info return_token_ids return_prompt_token_ids reasoning_effort
        thinking data_parallel_rank bootstrap_host bootstrap_port bootstrap_room response_format tool_choice
        parallel_tool_calls
    """
    assert set(extensions.split()) <= CHAT_FIELDS.keys()
