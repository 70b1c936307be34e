"""A parsed request of a generating route: what to run, and how chunks become events and events a response.

The streamed response is the events, the other one is `join` of the same events: there is no second code path.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from trunkline.engine.frontend import Chunk, GenerationRequest, Prepared
from trunkline.engine.native import sampling_params
from trunkline.engine.usage import Usage
from trunkline.server.fields import TO_SAMPLING
from trunkline.server.tools.formats import ToolFormat
from trunkline.text.chat_template import ChatTemplate
from trunkline.text.reasoning import ReasoningFormat
from trunkline.text.tokenizer import Tokenizer
from trunkline.types import RequestError, SamplingParams

Json = dict[str, Any]


class Call(Protocol):
    """One request to a generating route."""

    @property
    def requests(self) -> list[GenerationRequest]: ...
    @property
    def stream(self) -> bool: ...
    @property
    def names(self) -> Mapping[str, str]:
        """Names of parameters in the engine -> in this route, for errors."""
        ...

    def events(
        self, batch: Sequence[Prepared], chunks: AsyncGenerator[Chunk, None]
    ) -> AsyncGenerator[Json, None]:
        """What a stream sends, in order."""
        ...

    def join(self, events: Sequence[Json]) -> Any:
        """The body of a response that is not streamed."""
        ...


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What routes know of the model. `defaults`: SamplingParams fields that replace the interface's own."""

    name: str
    path: str
    architecture: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    defaults: Mapping[str, Any]
    weight_version: str
    reasoning: ReasoningFormat | None = None
    tools: ToolFormat | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def check_name(self, asked: str | None) -> None:
        """Raises RequestError when another model is asked for."""
        if asked not in (None, "", "default", self.name, self.path):
            raise RequestError(
                f"the model {asked[:200]!r} is not served here; this server has {self.name!r}",
                code="model_not_found",
                param="model",
                status=404,
            )

    def sampling_params(self, fields: Mapping[str, Any], max_new_tokens: int | None) -> SamplingParams:
        """Of the checked fields of an OpenAI-style request. `max_new_tokens` is the route's default."""
        given = {TO_SAMPLING.get(name, name): value for name, value in fields.items()}
        known = {name: given[name] for name in SamplingParams.__struct_fields__ if name in given}
        return sampling_params(known, {"max_new_tokens": max_new_tokens, **self.defaults})


def includes_usage(fields: Mapping[str, Any]) -> bool:
    """Whether a stream ends with the usage."""
    if "stream_options" in fields and not fields.get("stream"):
        raise RequestError(
            "stream_options is only for stream: true", code="invalid_value", param="stream_options"
        )
    wanted: bool = fields.get("stream_options", {}).get("include_usage", False)
    return wanted


def usage_dict(usage: Usage) -> Json:
    """Usage in OpenAI's shape."""
    details = {}
    if usage.reasoning_tokens is not None:
        details["reasoning_tokens"] = usage.reasoning_tokens
    known = dict(details)
    if usage.forced_tokens:
        details["forced_tokens"] = usage.forced_tokens
    miss = {} if usage.prefix_miss is None else {"prefix_miss": usage.prefix_miss}
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, **miss},
        **({"completion_tokens_details": details} if details else {}),
        **known,
    }
