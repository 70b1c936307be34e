"""Reasoning told apart from answers: formats, all ways to cut a text (P4), and what interfaces show of it."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import httpx
import pytest

from tests.server.conftest import events_of, http_client, make_app
from tests.server.fake_client import FakeClient
from trunkline.config.flags import REASONING_PARSERS
from trunkline.config.schema import EngineConfig, ServerConfig
from trunkline.text.reasoning import (
    REASONING_FORMATS,
    Reasoning,
    ReasoningMeter,
    ReasoningSplitter,
    reasoning_format,
    split_reasoning,
)
from trunkline.text.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}
FINAL = "<|start|>assistant<|channel|>final<|message|>"
HARMONY_CALL = "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"

# (format, begins inside, text, reasoning, answer)
CASES = [
    ("qwen3", False, "<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
    ("qwen3", False, "Just text.", "", "Just text."),
    ("qwen3", False, " \n <think>a</think> b ", "a", "b "),
    ("qwen3", False, "<thin", "", "<thin"),
    ("qwen3", False, "<think>a < b </thin k> c", "a < b </thin k> c", ""),
    ("qwen3", False, "x <think>a</think>", "", "x <think>a</think>"),
    ("qwen3", True, "Hm.\n</think>\n\nYes </think>.", "Hm.", "Yes </think>."),
    ("deepseek-r1", True, "<think>Hm</think>Yes", "Hm", "Yes"),
    ("deepseek-r1", True, "  \n", "", ""),
    ("kimi", True, "◁think▷a◁/think▷b", "a", "b"),
    ("mistral", False, "[THINK]a[/THINK]b", "a", "b"),
    ("kimi_k2", False, "<think>a <|tool_calls_section_begin|>x", "a", "<|tool_calls_section_begin|>x"),
    ("gpt-oss", False, f"<|channel|>analysis<|message|>Hm.<|end|>{FINAL}Yes.<|return|>", "Hm.", "Yes."),
    ("gpt-oss", False, f"<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary"
     f"<|message|>I look. <|end|>{HARMONY_CALL}", "a", f"I look. {HARMONY_CALL}"),
    ("gpt-oss", False, "<|channel|>analysis<|message|>cut off", "cut off", ""),
    ("gpt-oss", False, "no channels at all", "", "no channels at all"),
    ("gpt-oss", False, "<|channel|>" + "x" * 600, "", "<|channel|>" + "x" * 600),
]  # fmt: skip


def split(reasoning: Reasoning, pieces: list[str]) -> tuple[str, str]:
    splitter = ReasoningSplitter(reasoning)
    parts = [*map(splitter.feed, pieces), splitter.flush()]
    return "".join(thought for thought, _ in parts), "".join(answer for _, answer in parts)


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize(("name", "inside", "text", "thought", "answer"), CASES)
def test_every_way_to_cut_gives_the_same(
    name: str, inside: bool, text: str, thought: str, answer: str, separate: bool
) -> None:
    reasoning = Reasoning(REASONING_FORMATS[name], inside=inside, separate=separate)
    whole = split(reasoning, [text])
    if separate:
        assert (whole[0].strip(), whole[1]) == (thought, answer)
    else:
        assert "".join(whole) == text
    rng = random.Random(5)
    cuts = [[text[:i], text[i:]] for i in range(len(text) + 1)] + [list(text)]
    for _ in range(20):
        ends = sorted(rng.choices(range(len(text) + 1), k=4))
        cuts.append([text[a:b] for a, b in itertools.pairwise([0, *ends, len(text)])])
    for pieces in cuts:
        assert split(reasoning, pieces) == whole, pieces


def test_tokens_of_reasoning_are_counted_with_their_tags() -> None:
    tokens = ["<think>", "a", " b", "</think>", "\n\n", "Yes"]
    meter = ReasoningMeter(Reasoning(REASONING_FORMATS["qwen3"]))
    for token in tokens:
        meter.feed(token)
    assert meter.tokens == 4
    plain = ReasoningMeter(Reasoning(REASONING_FORMATS["qwen3"]))
    for token in ("Hello", " <think>"):
        plain.feed(token)
    assert plain.tokens == 0


def test_whole_texts() -> None:
    assert split_reasoning("<think>a</think>b", "qwen3") == ("a", "b")
    assert split_reasoning("a</think>b", "qwen3") == ("a", "b")
    assert split_reasoning("b", "deepseek-r1") == ("", "b")
    assert split_reasoning("b <think>a", "qwen3") == ("a", "b ")


def test_names_on_the_command_line() -> None:
    assert ("auto", "none", *REASONING_FORMATS) == REASONING_PARSERS


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("<think> </think> enable_thinking", "qwen3"),
        ("<|channel|>analysis", "gpt-oss"),
        ("◁think▷", "kimi"),
        ("[THINK]", "mistral"),
        ("nothing", None),
    ],
)
def test_auto_reads_the_template(template: str, name: str | None) -> None:
    found = reasoning_format("auto", template)
    assert (found and found.begin) == (name and REASONING_FORMATS[name].begin)
    assert found is None or not found.always  # the prompt shows whether an output begins inside


# ---------------------------------------------------------------------- over HTTP
def app_with(tokenizer: Tokenizer, config: EngineConfig, reply: str, **server: Any) -> httpx.AsyncClient:
    tokens = tokenizer.encode(reply)
    client = FakeClient(lambda _: tokens, eos=2, vocab_size=400)
    config = EngineConfig(model=config.model, scheduler=config.scheduler, server=ServerConfig(**server))
    return http_client(make_app(client, tokenizer, config))


REPLY = "<think>\nSo: 1.\n</think>\n\nOne."


async def test_reasoning_is_told_apart(tokenizer: Tokenizer, config: EngineConfig) -> None:
    async with app_with(tokenizer, config, REPLY) as http:
        answer = (await http.post(CHAT, json=HI)).json()
        message = answer["choices"][0]["message"]
        assert message == {"role": "assistant", "content": "One.", "reasoning_content": "So: 1."}
        count = answer["usage"]["reasoning_tokens"]
        assert 0 < count < answer["usage"]["completion_tokens"]
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == count
        plain = (await http.post(CHAT, json={**HI, "separate_reasoning": False})).json()
        assert plain["choices"][0]["message"] == {"role": "assistant", "content": REPLY}
        assert plain["usage"] == answer["usage"]


async def test_reasoning_comes_whole_if_asked_for(tokenizer: Tokenizer, config: EngineConfig) -> None:
    async with app_with(tokenizer, config, REPLY) as http:
        for whole in (False, True):
            body = {**HI, "stream": True, "stream_reasoning": not whole}
            events = events_of((await http.post(CHAT, json=body)).text)
            deltas = [event["choices"][0]["delta"] for event in events]
            thoughts = [delta["reasoning_content"] for delta in deltas if "reasoning_content" in delta]
            assert "".join(thoughts) == "So: 1." and (len(thoughts) == 1) == whole
            assert "".join(delta.get("content", "") for delta in deltas) == "One."


async def test_the_prompt_may_begin_the_reasoning(tokenizer: Tokenizer, config: EngineConfig) -> None:
    async with app_with(tokenizer, config, "So: 1.\n</think>\n\nOne.") as http:
        body = {**HI, "chat_template_kwargs": {"enable_thinking": True}}
        message = (await http.post(CHAT, json=body)).json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("So: 1.", "One.")
        message = (await http.post(CHAT, json=HI)).json()["choices"][0]["message"]
        assert message["content"] == "So: 1.\n</think>\n\nOne."


async def test_a_named_parser_and_none(tokenizer: Tokenizer, config: EngineConfig) -> None:
    async with app_with(tokenizer, config, "a </think> b", reasoning_parser="deepseek-r1") as http:
        message = (await http.post(CHAT, json=HI)).json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("a", "b")
    async with app_with(tokenizer, config, REPLY, reasoning_parser="none") as http:
        answer = (await http.post(CHAT, json=HI)).json()
        assert answer["choices"][0]["message"]["content"] == REPLY
        assert "reasoning_tokens" not in answer["usage"]
        response = await http.post("/generate", json={"text": "hi", "require_reasoning": True})
        assert response.json()["error"]["code"] == "no_reasoning"


async def test_native_answers_count_reasoning(tokenizer: Tokenizer, config: EngineConfig) -> None:
    async with app_with(tokenizer, config, "a b </think> c") as http:
        answer = (await http.post("/generate", json={"text": "hi", "require_reasoning": True})).json()
        assert answer["text"] == "a b </think> c"
        assert answer["meta_info"]["reasoning_tokens"] == len(tokenizer.encode("a b </think>"))
        answer = (await http.post("/generate", json={"text": "hi"})).json()
        assert "reasoning_tokens" not in answer["meta_info"]


async def test_separate_reasoning_route(http: httpx.AsyncClient) -> None:
    body: dict[str, Any] = {"text": "<think>a</think>\nb", "reasoning_parser": "qwen3"}
    assert (await http.post("/separate_reasoning", json=body)).json() == {"reasoning_text": "a", "text": "b"}
    answer = (await http.post("/separate_reasoning", json={**body, "return_blocks": True})).json()
    assert answer["reasoning_blocks"] == ["a"] and answer["text_blocks"] == ["b"]
    assert answer["blocks"] == [{"type": "reasoning", "text": "a"}, {"type": "text", "text": "b"}]
    response = await http.post("/separate_reasoning", json={**body, "reasoning_parser": "x"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "reasoning_parser")


async def test_parse_function_call_route(http: httpx.AsyncClient) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    text = 'I add.<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    body = {"text": text, "tools": tools, "tool_call_parser": "hermes"}
    answer = (await http.post("/parse_function_call", json=body)).json()
    assert answer["normal_text"] == "I add."
    (call,) = answer["calls"]
    assert (call["name"], json.loads(call["parameters"]), call["tool_index"]) == ("add", {"a": 1}, 0)
    response = await http.post("/parse_function_call", json={**body, "tool_call_parser": "x"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tool_call_parser")


async def test_harmony_from_end_to_end(tokenizer: Tokenizer, config: EngineConfig) -> None:
    reply = f"<|channel|>analysis<|message|>Hm.<|end|>{HARMONY_CALL}"
    tools = [{"type": "function", "function": {"name": "f"}}]
    names = {"reasoning_parser": "gpt-oss", "tool_call_parser": "gpt-oss"}
    async with app_with(tokenizer, config, reply, **names) as http:
        choice = (await http.post(CHAT, json={**HI, "tools": tools})).json()["choices"][0]
    message = choice["message"]
    assert (message["reasoning_content"], message["content"], choice["finish_reason"]) == (
        "Hm.",
        None,
        "tool_calls",
    )
    assert [call["function"] for call in message["tool_calls"]] == [{"name": "f", "arguments": "{}"}]
    async with app_with(
        tokenizer, config, f"<|channel|>analysis<|message|>Hm.<|end|>{FINAL}Yes.", **names
    ) as http:
        message = (await http.post(CHAT, json=HI)).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")
