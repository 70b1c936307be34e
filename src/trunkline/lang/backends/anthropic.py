"""Programs on Anthropic's Messages API."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from trunkline.config.credentials import environment_key
from trunkline.http import HttpClient
from trunkline.lang.backends.backend import Backend, Piece, Prompt
from trunkline.lang.chat_template import ChatTemplate, get_chat_template
from trunkline.lang.ir import Sampling
from trunkline.types import RequestError

API_VERSION = "2023-06-01"

_TAKEN = ("max_new_tokens", "stop", "temperature", "top_p", "top_k", "json_schema")


class Anthropic(Backend):
    """The model `model_name` of Anthropic, or of a server with the same interface at `base_url`."""

    is_chat_model = True
    takes_images = True

    def __init__(
        self,
        model_name: str,
        *,
        api_key: str | None = None,
        base_url: str = "https://api.anthropic.com",
        verify: bool | str | None = None,
        default_headers: Mapping[str, str] | None = None,
    ) -> None:
        """Raises RequestError without an API key: give one, or set ANTHROPIC_API_KEY."""
        key = api_key or environment_key("ANTHROPIC_API_KEY")
        if key is None:
            raise RequestError(
                "no API key: pass api_key, or set ANTHROPIC_API_KEY", code="no_api_key", status=401
            )
        headers = {"x-api-key": key, "anthropic-version": API_VERSION, **(default_headers or {})}
        self._http = HttpClient(base_url, headers, verify)
        self.model_name = model_name

    def get_chat_template(self) -> ChatTemplate:
        return get_chat_template("claude")

    async def generate(self, prompt: Prompt, sampling: Sampling, stream: bool) -> AsyncGenerator[Piece, None]:
        body = self._request(prompt, sampling)
        if not stream:
            answer = await self._http.json("POST", "/v1/messages", body)
            text = "".join(block.get("text", "") for block in answer["content"])
            yield text, _meta(answer, answer.get("usage") or {})
            return
        meta: dict[str, Any] = {}
        usage: dict[str, Any] = {}  # the first event counts the prompt, the last one the output
        async with aclosing(self._http.events("/v1/messages", {**body, "stream": True})) as events:
            async for event in events:
                if event["type"] == "message_start":
                    usage |= event["message"].get("usage") or {}
                elif event["type"] == "content_block_delta":
                    yield event["delta"].get("text", ""), meta
                elif event["type"] == "message_delta":
                    usage |= event.get("usage") or {}
                    meta = _meta(event["delta"], usage)
                    yield "", meta

    def _request(self, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        """Raises RequestError for what can't be said in this interface."""
        asked = sampling.asked()
        for name in asked:
            if name not in _TAKEN:
                raise self.unsupported(name)
        messages = [
            {"role": one["role"], "content": _content(one["content"])} for one in prompt.messages
        ] or [{"role": "user", "content": prompt.text}]
        body: dict[str, Any] = {"model": self.model_name, "max_tokens": sampling.max_new_tokens}
        if messages[0]["role"] == "system":
            body["system"] = messages.pop(0)["content"]
        if prompt.role == "assistant" and prompt.turn.strip():
            messages.append({"role": "assistant", "content": prompt.turn.rstrip()})  # it goes on from there
        elif prompt.role not in (None, "assistant"):
            raise RequestError(
                f"gen() inside the {prompt.role}'s turn: a chat model speaks in the assistant's turns only",
                code="unsupported_field",
                param="gen",
            )
        body["messages"] = messages
        if sampling.stops:
            body["stop_sequences"] = list(sampling.stops)
        body["temperature"] = sampling.temperature
        if sampling.json_schema is not None:
            body["output_config"] = {"format": {"type": "json_schema", "schema": sampling.schema}}
        body |= {name: value for name, value in asked.items() if name in ("top_p", "top_k")}
        return body


def _content(content: Any) -> Any:
    """Text as it is; parts in Anthropic's form."""
    if isinstance(content, str):
        return content
    parts = []
    for part in content:
        if part["type"] == "text":
            parts.append(part)
            continue
        kind, _, data = part["image_url"]["url"].removeprefix("data:").partition(";base64,")
        parts.append({"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}})
    return parts


def _meta(message: Mapping[str, Any], usage: Mapping[str, Any]) -> dict[str, Any]:
    """`input_tokens` are only those that no cache had."""
    cached = usage.get("cache_read_input_tokens") or 0
    written = usage.get("cache_creation_input_tokens") or 0
    return {
        "finish_reason": {"type": message.get("stop_reason")},
        "prompt_tokens": (usage.get("input_tokens") or 0) + cached + written,
        "completion_tokens": usage.get("output_tokens") or 0,
        "cached_tokens": cached,
    }
