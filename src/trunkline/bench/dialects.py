"""How a load test speaks to a server: for each interface, the body of a request and what its events say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import msgspec

from trunkline.bench.datasets import Content, Session, as_text


class Usage(msgspec.Struct):
    """Token counts as the server gives them."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


class Conversation(Protocol):
    """One session in one interface: it remembers what was said."""

    def body(self, content: Content, output_len: int) -> dict[str, Any]:
        """The request of the next turn."""
        ...

    def read(self, event: Mapping[str, Any], usage: Usage) -> bool:
        """Take an event in; whether it brought output."""
        ...


class Native:
    """POST /generate, as Trunkline and SGLang have it. Answers go on as the tokens that they were."""

    path = "/generate"

    def __init__(self, session: Session, model: str) -> None:
        self._said: Content = session.system or ""
        self._answer: Mapping[str, Any] = {}

    def body(self, content: Content, output_len: int) -> dict[str, Any]:
        self._said = _joined(
            self._said, self._answer.get("output_ids", []), self._answer.get("text", ""), content
        )
        self._answer = {}
        prompt = {"text" if isinstance(self._said, str) else "input_ids": self._said}
        sampling = {"max_new_tokens": output_len, "temperature": 0.0, "ignore_eos": True}
        return {**prompt, "sampling_params": sampling, "stream": True}

    def read(self, event: Mapping[str, Any], usage: Usage) -> bool:
        self._answer, meta, before = event, event["meta_info"], usage.output_tokens
        usage.prompt_tokens, usage.output_tokens = meta["prompt_tokens"], meta["completion_tokens"]
        usage.cached_tokens = meta.get("cached_tokens") or 0
        return usage.output_tokens > before


class Completions:
    """POST /v1/completions. It does not tell an answer's tokens, so a session of several turns is text."""

    path = "/v1/completions"

    def __init__(self, session: Session, model: str) -> None:
        self._model = model
        self._text = len(session.turns) > 1
        self._said: Content = session.system or ""
        self._answer: list[str] = []

    def body(self, content: Content, output_len: int) -> dict[str, Any]:
        new = as_text(content) if self._text else content
        self._said = _joined(self._said, [], "".join(self._answer), new)
        self._answer = []
        return {"model": self._model, "prompt": self._said, "max_tokens": output_len, **_STREAMED}

    def read(self, event: Mapping[str, Any], usage: Usage) -> bool:
        _read_usage(event, usage)
        self._answer += [choice.get("text") or "" for choice in event.get("choices", ())]
        return bool(event.get("choices"))


class Chat:
    """POST /v1/chat/completions."""

    path = "/v1/chat/completions"

    def __init__(self, session: Session, model: str) -> None:
        self._model = model
        system = session.system
        self._messages: list[dict[str, str]] = (
            [] if system is None else [{"role": "system", "content": system}]
        )
        self._answer: list[str] = []

    def body(self, content: Content, output_len: int) -> dict[str, Any]:
        if any(message["role"] == "user" for message in self._messages):
            self._messages.append({"role": "assistant", "content": "".join(self._answer)})
        self._messages.append({"role": "user", "content": as_text(content)})
        self._answer = []
        return {"model": self._model, "messages": self._messages, "max_tokens": output_len, **_STREAMED}

    def read(self, event: Mapping[str, Any], usage: Usage) -> bool:
        _read_usage(event, usage)
        deltas = [choice.get("delta") or {} for choice in event.get("choices", ())]
        self._answer += [delta.get("content") or "" for delta in deltas]
        return any(
            delta.get(name) for delta in deltas for name in ("content", "reasoning_content", "tool_calls")
        )


_STREAMED: Mapping[str, Any] = MappingProxyType(
    {"temperature": 0.0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
)
DIALECTS: Mapping[str, type[Native] | type[Completions] | type[Chat]] = MappingProxyType(
    {"trunkline": Native, "sglang": Native, "openai": Completions, "openai-chat": Chat}
)


def _joined(said: Content, ids: Sequence[int], text: str, new: Content) -> Content:
    """All that was said, as tokens where everything is."""
    if isinstance(new, str) or (isinstance(said, str) and said):
        return as_text(said) + text + as_text(new)
    return [*(said or ()), *ids, *new]


def _read_usage(event: Mapping[str, Any], usage: Usage) -> None:
    found = event.get("usage")
    if found:
        usage.prompt_tokens, usage.output_tokens = found["prompt_tokens"], found["completion_tokens"]
        usage.cached_tokens = (found.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
