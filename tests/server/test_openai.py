"""The OpenAI routes: shapes, and streaming equal to not streaming (P3)."""

from __future__ import annotations

import itertools
from typing import Any

import httpx
import pytest

from tests.server.conftest import REPLY, events_of, http_client, make_app
from tests.server.fake_client import FakeClient
from trunkline.config.schema import EngineConfig
from trunkline.text.tokenizer import Tokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


async def whole(http: httpx.AsyncClient, route: str, body: dict[str, Any]) -> dict[str, Any]:
    response = await http.post(route, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def streamed(http: httpx.AsyncClient, route: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = await http.post(route, json={**body, **options})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events_of(response.text)


# ---------------------------------------------------------------------- shapes
async def test_chat(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.cached = 8
    answer = await whole(http, CHAT, {**HI, "model": "tiny"})
    assert answer.pop("id").startswith("chatcmpl-") and answer.pop("created") > 0
    assert answer == {
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": REPLY},
                "logprobs": None,
                "finish_reason": "stop",
                "matched_stop": 2,
            }
        ],
        "usage": {
            "prompt_tokens": 21,
            "completion_tokens": 23,
            "total_tokens": 44,
            "prompt_tokens_details": {"cached_tokens": 8},
            "completion_tokens_details": {"reasoning_tokens": 0},
            "reasoning_tokens": 0,
        },
    }


async def test_chat_stream(http: httpx.AsyncClient) -> None:
    events = await streamed(http, CHAT, {**HI, "max_tokens": 2})
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    choices = [event["choices"][0] for event in events[:-1]]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""},
        {"content": "Hello"},
        {"content": ","},
        {},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "length"]
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 2
    response = await http.post(CHAT, json={**HI, "stream": True})
    assert not any("usage" in event for event in events_of(response.text))


async def test_chat_logprobs(http: httpx.AsyncClient) -> None:
    answer = await whole(http, CHAT, {**HI, "logprobs": True, "top_logprobs": 2, "max_tokens": 5})
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 5
    assert content[0] | {"top_logprobs": []} == {
        "token": "Hello", "logprob": -0.5, "bytes": [72, 101, 108, 108, 111], "top_logprobs": []
    }  # fmt: skip
    assert [len(entry["top_logprobs"]) for entry in content] == [2] * 5
    assert (content[4]["token"], content[4]["bytes"]) == ("�", [0xC3])
    assert (await whole(http, CHAT, HI))["choices"][0]["logprobs"] is None


async def test_completion_echo_and_logprobs(http: httpx.AsyncClient) -> None:
    body = {"prompt": "hi", "echo": True, "logprobs": 1, "max_tokens": 3}
    choice = (await whole(http, COMPLETIONS, body))["choices"][0]
    assert choice["text"] == "hiHello, "
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["h", "i", "Hello", ",", " "]
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5]
    assert logprobs["text_offset"] == [0, 1, 2, 7, 8]
    assert logprobs["top_logprobs"][0] is None and "Hello" in logprobs["top_logprobs"][2]


@pytest.mark.parametrize("prompt", ["hi", ["hi"], [74, 75], [[74, 75]]])
async def test_completion_prompts(http: httpx.AsyncClient, client: FakeClient, prompt: Any) -> None:
    answer = await whole(http, COMPLETIONS, {"prompt": prompt, "echo": True})
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    assert answer["choices"][0]["text"].startswith("hiHello, w")
    assert answer["usage"]["completion_tokens"] == 16
    assert client.added[-1].token_ids == [74, 75]


async def test_many_prompts_and_choices(http: httpx.AsyncClient, client: FakeClient) -> None:
    answer = await whole(http, COMPLETIONS, {"prompt": ["h", "hi"], "n": 3, "seed": 10, "echo": True})
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert [choice["text"][:2] for choice in answer["choices"]] == ["hH"] * 3 + ["hi"] * 3
    assert answer["usage"]["prompt_tokens"] == 3 and answer["usage"]["completion_tokens"] == 6 * 16
    assert [add.params.sampling_seed for add in client.added] == [10, 11, 12] * 2
    assert len({add.rid for add in client.added}) == 6


# ---------------------------------------------------------------------- streaming = not streaming
BODIES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {**HI, **options})
    for options in (
        {},
        {"stop": "END"},
        {"stop": ["語", "of"], "no_stop_trim": True},
        {"max_tokens": 3},
        {"max_tokens": 0},
        {"n": 3, "seed": 5},
        {"logprobs": True, "top_logprobs": 3, "stop": ["END"]},
        {"skip_special_tokens": False, "no_stop_trim": True},
        {"tools": TOOLS},
        {"tools": TOOLS, "tool_choice": "none"},
        {"tools": TOOLS, "logprobs": True, "n": 2},
        {"tools": TOOLS, "chat_template_kwargs": {"enable_thinking": True}},
        {"separate_reasoning": False, "stop": "END"},
        {"stream_reasoning": False, "logprobs": True},
        {"stop_token_ids": [14]},
        {"ignore_eos": True, "max_tokens": 4},
    )
] + [
    (COMPLETIONS, {"prompt": "hi", **options})
    for options in (
        {},
        {"stop": "END", "max_tokens": 30},
        {"echo": True, "logprobs": 2},
        {"echo": True, "max_tokens": 0},
        {"n": 2, "logprobs": 0},
        {"prompt": ["a", "b"], "n": 2, "stop": ["ö"]},
    )
]


def from_stream(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What a client makes of a stream, written apart from the server's own joining."""
    choices: dict[int, dict[str, Any]] = {}
    for choice in itertools.chain.from_iterable(event["choices"] for event in events):
        seen = choices.setdefault(
            choice["index"],
            {"text": "", "reasoning": "", "calls": [], "tokens": [], "finish": None, "matched": None},
        )
        assert seen["finish"] is None, "nothing follows a finish reason"
        delta = choice.get("delta", {})
        seen["text"] += choice.get("text", "") + delta.get("content", "")
        for call in delta.get("tool_calls", []):
            if "id" in call:
                assert call["index"] == len(seen["calls"]) and call["type"] == "function"
                seen["calls"].append(dict(call["function"]))
            else:
                seen["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
        seen["reasoning"] += delta.get("reasoning_content", "")
        seen["tokens"] += tokens_of(choice["logprobs"])
        seen["finish"], seen["matched"] = choice["finish_reason"], choice["matched_stop"]
    return {"choices": choices, "usage": events[-1]["usage"]}


def from_whole(answer: dict[str, Any]) -> dict[str, Any]:
    choices = {}
    for choice in answer["choices"]:
        message = choice.get("message", {})
        choices[choice["index"]] = {
            "text": choice.get("text", "") + (message.get("content") or ""),
            "reasoning": message.get("reasoning_content", ""),
            "calls": [call["function"] for call in message.get("tool_calls", [])],
            "tokens": tokens_of(choice["logprobs"]),
            "finish": choice["finish_reason"],
            "matched": choice["matched_stop"],
        }
    return {"choices": choices, "usage": answer["usage"]}


def tokens_of(logprobs: dict[str, Any] | None) -> list[Any]:
    if logprobs is None:
        return []
    if "content" in logprobs:
        return list(logprobs["content"])
    return list(zip(*logprobs.values(), strict=True))


@pytest.mark.parametrize(
    "reply",
    [
        REPLY,
        f"<think>\nHm {CALL}\n</think>\n\n{CALL} END",
        f"Let me see. {CALL}",
        f"{CALL}\n{CALL}",
        "<tool_call>{broken",
        "",
    ],
)
@pytest.mark.parametrize(("route", "body"), BODIES)
async def test_streaming_equals_not_streaming(
    tokenizer: Tokenizer, config: EngineConfig, reply: str, route: str, body: dict[str, Any]
) -> None:
    tokens = tokenizer.encode(reply)
    seen = []
    for size in (1, 2, 5, 100):
        client = FakeClient(lambda _: tokens, eos=2, vocab_size=400, tokens_per_message=size)
        async with http_client(make_app(client, tokenizer, config)) as http:
            seen.append(from_whole(await whole(http, route, body)))
            seen.append(from_stream(await streamed(http, route, body)))
    assert all(one == seen[0] for one in seen)


# ---------------------------------------------------------------------- tools
async def test_tool_calls(tokenizer: Tokenizer, config: EngineConfig) -> None:
    reply = tokenizer.encode(f"I add. {CALL}\n{CALL}")
    client = FakeClient(lambda _: reply, eos=2, vocab_size=400)
    async with http_client(make_app(client, tokenizer, config)) as http:
        choice = (await whole(http, CHAT, {**HI, "tools": TOOLS}))["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "I add."
        calls = choice["message"]["tool_calls"]
        assert [call["function"] for call in calls] == [{"name": "add", "arguments": '{"a": 1}'}] * 2
        assert calls[0]["id"] != calls[1]["id"] and calls[0]["type"] == "function"
        assert "tools\n" in tokenizer.decode(client.added[-1].token_ids, skip_special_tokens=False)
        plain = (await whole(http, CHAT, {**HI, "tools": TOOLS, "tool_choice": "none"}))["choices"][0]
        assert plain["message"]["content"].count("<tool_call>") == 2
        assert "tools\n" not in tokenizer.decode(client.added[-1].token_ids, skip_special_tokens=False)


async def test_a_call_that_never_ends_is_text(tokenizer: Tokenizer, config: EngineConfig) -> None:
    reply = tokenizer.encode('a <tool_call>{"name"')
    client = FakeClient(lambda _: reply, eos=2, vocab_size=400)
    async with http_client(make_app(client, tokenizer, config)) as http:
        choice = (await whole(http, CHAT, {**HI, "tools": TOOLS}))["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": 'a <tool_call>{"name"'}
    assert choice["finish_reason"] == "stop"


async def test_tools_that_the_model_would_not_see_are_refused(
    client: FakeClient, tokenizer: Tokenizer, config: EngineConfig
) -> None:
    app = make_app(client, tokenizer, config, template="{{ messages[0].content }}")
    async with http_client(app) as http:
        response = await http.post(CHAT, json={**HI, "tools": TOOLS})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
        assert (await http.post(CHAT, json={**HI, "tools": TOOLS, "tool_choice": "none"})).status_code == 200
    async with http_client(make_app(client, tokenizer, config, template=None)) as http:
        response = await http.post(CHAT, json=HI)
        assert response.json()["error"]["code"] == "no_chat_template"


async def test_messages_reach_the_template(
    http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer
) -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "7"},
        {"role": "assistant", "content": "It is "},
    ]  # fmt: skip
    kwargs = {"enable_thinking": True}
    await whole(http, CHAT, {"messages": messages, "chat_template_kwargs": kwargs})
    prompt = tokenizer.decode(client.added[-1].token_ids, skip_special_tokens=False)
    assert prompt.startswith("<|im_start|>system\na\nb<|im_end|>\n<|im_start|>assistant\n<|im_end|>")
    assert prompt.endswith("It is <|im_end|>\n<|im_start|>assistant\n<think>")
    await whole(http, CHAT, {"messages": messages, "continue_final_message": True})
    prompt = tokenizer.decode(client.added[-1].token_ids, skip_special_tokens=False)
    assert prompt.endswith("<|im_start|>assistant\nIt is ")


# ---------------------------------------------------------------------- sampling
async def test_parameters_reach_the_core(http: httpx.AsyncClient, client: FakeClient) -> None:
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "frequency_penalty": 0.2, "seed": 4,
        "presence_penalty": -0.3, "repetition_penalty": 1.1, "logit_bias": {"5": -3}, "stop_token_ids": [9],
        "ignore_eos": True, "min_tokens": 2, "max_tokens": 8, "priority": 3,
        "extra_key": "e", "cache_salt": "s",
    }  # fmt: skip
    await whole(http, CHAT, {**HI, **fields, "rid": "mine"})
    add = client.added[-1]
    params = add.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 7, 0.1)
    assert (params.frequency_penalty, params.presence_penalty, params.repetition_penalty) == (0.2, -0.3, 1.1)
    assert (params.logit_bias, params.stop_token_ids, params.ignore_eos) == ({5: -3.0}, (9,), True)
    assert (params.min_new_tokens, params.max_new_tokens, params.sampling_seed) == (2, 8, 4)
    assert (add.rid, add.priority, add.cache_key.salt, add.cache_key.weight_version) == (
        "mine",
        3,
        '["e", "s"]',
        "v7",
    )


async def test_defaults_of_the_model(client: FakeClient, tokenizer: Tokenizer, config: EngineConfig) -> None:
    async with http_client(make_app(client, tokenizer, config, temperature=0.25, top_k=20)) as http:
        await whole(http, CHAT, {**HI, "top_k": 5})
        assert (client.added[-1].params.temperature, client.added[-1].params.top_k) == (0.25, 5)
        await whole(http, CHAT, {**HI, "temperature": None})
        assert client.added[-1].params.temperature == 0.25
        assert client.added[-1].params.max_new_tokens == client.max_context - 21
        await http.post("/generate", json={"text": "hi"})
        assert client.added[-1].params.temperature == 1.0


async def test_seeds_differ_unless_given(http: httpx.AsyncClient, client: FakeClient) -> None:
    for _ in range(3):
        await whole(http, CHAT, HI)
    seeds = [add.params.sampling_seed for add in client.added]
    assert len(set(seeds)) == 3 and all(isinstance(seed, int) and seed >= 0 for seed in seeds)


async def test_a_default_output_limit_shrinks_to_the_context(
    http: httpx.AsyncClient, client: FakeClient
) -> None:
    await whole(http, COMPLETIONS, {"prompt": [5] * (client.max_context - 4)})
    assert client.added[-1].params.max_new_tokens == 4


# ---------------------------------------------------------------------- what is told beside the answer
@pytest.mark.parametrize(("route", "body"), [(CHAT, {**HI, "n": 2}), (COMPLETIONS, {"prompt": ["a", "bc"]})])
async def test_token_ids_and_meta_info(
    http: httpx.AsyncClient, tokenizer: Tokenizer, client: FakeClient, route: str, body: dict[str, Any]
) -> None:
    asked = {**body, "return_token_ids": True, "return_prompt_token_ids": True, "return_meta_info": True}
    answer = await whole(http, route, {**asked, "max_tokens": 9})
    told: dict[int, dict[str, Any]] = {}
    for event in await streamed(http, route, {**asked, "max_tokens": 9}):
        for choice in event["choices"]:
            kept = told.setdefault(choice["index"], {"token_ids": []})
            kept["token_ids"] += choice.get("token_ids", [])
            kept |= {name: choice[name] for name in ("prompt_token_ids", "meta_info") if name in choice}
    for choice in answer["choices"]:
        assert choice["token_ids"] == tokenizer.encode(REPLY)[:9]
        assert choice["meta_info"]["completion_tokens"] == 9
        assert choice["meta_info"]["finish_reason"] == {"type": "length", "length": 9}
        prompt = client.added[choice["index"]].token_ids
        assert choice["prompt_token_ids"] == prompt and choice["meta_info"]["prompt_tokens"] == len(prompt)
        streamed_choice = told[choice["index"]]
        assert all(streamed_choice[name] == choice[name] for name in ("token_ids", "prompt_token_ids"))
    plain = await whole(http, route, {**body, "max_tokens": 9})
    assert not any(
        {"token_ids", "prompt_token_ids", "meta_info"} & set(choice) for choice in plain["choices"]
    )
    names = {name for choice in plain["choices"] for name in choice}
    assert not names & {"token_ids", "prompt_token_ids", "meta_info"}
