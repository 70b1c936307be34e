"""Programs on OpenAI-compatible endpoints: OpenAI's own, Azure's, and every server that speaks the same."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from trunkline.config.credentials import environment_key
from trunkline.http import HttpClient
from trunkline.lang.backends.backend import Backend, Piece, Prompt
from trunkline.lang.backends.native import common_prefix, dtype_regex
from trunkline.lang.chat_template import ChatTemplate, get_chat_template_by_model_path
from trunkline.lang.choices import ChoicesDecision
from trunkline.lang.ir import Sampling, Select
from trunkline.types import RequestError

# Fields that every endpoint has. Others are extensions, sent only where they ask for something.
_FIELDS = ("temperature", "top_p", "frequency_penalty", "presence_penalty", "n")
_EXTENSIONS = ("min_new_tokens", "stop_token_ids", "stop_regex", "top_k", "min_p", "ignore_eos", "regex")


@dataclass
class TokenUsage:
    """Tokens that calls have cost so far."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def reset(self) -> None:
        self.prompt_tokens = self.completion_tokens = 0


class OpenAI(Backend):
    """The model `model_name` of an OpenAI-compatible endpoint.

    A chat model (any but gpt-3.5-turbo-instruct, unless `is_chat_model` says) gets the closed turns as
    messages and generates a whole assistant turn; another one continues text. What `gen` asks for and an
    endpoint doesn't know, it refuses. `is_azure` takes azure_endpoint, api_version and, if it isn't the
    model's name, azure_deployment."""

    takes_images = True

    def __init__(
        self,
        model_name: str,
        is_chat_model: bool | None = None,
        chat_template: ChatTemplate | None = None,
        is_azure: bool = False,
        *,
        api_key: str | None = None,
        base_url: str | None = None,
        verify: bool | str | None = None,
        default_headers: Mapping[str, str] | None = None,
        azure_endpoint: str | None = None,
        azure_deployment: str | None = None,
        api_version: str | None = None,
    ) -> None:
        """Raises RequestError without an API key: give one, or set OPENAI_API_KEY (AZURE_OPENAI_API_KEY)."""
        variable = "AZURE_OPENAI_API_KEY" if is_azure else "OPENAI_API_KEY"
        key = api_key or environment_key(variable)
        if key is None:
            raise RequestError(f"no API key: pass api_key, or set {variable}", code="no_api_key", status=401)
        headers = {"api-key": key} if is_azure else {"Authorization": f"Bearer {key}"}
        self._query = ""
        if is_azure:
            if not (azure_endpoint and api_version):
                raise ValueError("is_azure needs azure_endpoint and api_version")
            base_url = f"{azure_endpoint.rstrip('/')}/openai/deployments/{azure_deployment or model_name}"
            self._query = f"?api-version={api_version}"
        url = base_url or environment_key("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        self._http = HttpClient(url, {**headers, **(default_headers or {})}, verify)
        self.model_name = model_name
        self.is_chat_model = (
            model_name != "gpt-3.5-turbo-instruct" if is_chat_model is None else is_chat_model
        )
        self.chat_template = chat_template or get_chat_template_by_model_path(model_name)
        self.token_usage = TokenUsage()
        self._counting = threading.Lock()

    def get_chat_template(self) -> ChatTemplate:
        return self.chat_template

    async def generate(self, prompt: Prompt, sampling: Sampling, stream: bool) -> AsyncGenerator[Piece, None]:
        path, body = self._request(prompt, sampling)
        quote = '"' if self._quoted(sampling) else ""
        if stream and sampling.n == 1:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            meta: dict[str, Any] = {}
            logprobs: dict[str, Any] = {}
            if quote:
                yield quote, meta
            async with aclosing(self._http.events(path + self._query, body)) as events:
                async for event in events:
                    self._count(event.get("usage"))
                    for choice in event.get("choices") or ():
                        _lengthen(logprobs, choice.get("logprobs") or {})
                        if choice.get("finish_reason"):
                            meta = {"finish_reason": {"type": choice["finish_reason"]}, "id": event.get("id")}
                            meta |= {"logprobs": logprobs} if logprobs else {}
                        yield _text(choice, "delta"), meta
            if quote:
                yield quote, meta
            return
        answer = await self._http.json("POST", path + self._query, body)
        self._count(answer.get("usage"))
        choices = sorted(answer["choices"], key=lambda choice: choice.get("index", 0))
        texts = [quote + _text(choice, "message") + quote for choice in choices]
        meta = {
            "id": answer.get("id"),
            "finish_reason": {"type": choices[0].get("finish_reason")},
            **(answer.get("usage") or {}),
        }
        if choices[0].get("logprobs"):
            meta["logprobs"] = choices[0]["logprobs"]
        yield (texts if sampling.n != 1 else texts[0]), meta

    def _request(self, prompt: Prompt, sampling: Sampling) -> tuple[str, dict[str, Any]]:
        """Path and body of a call. Raises RequestError for what can't be said in this interface."""
        body: dict[str, Any] = {"model": self.model_name, "max_tokens": sampling.max_new_tokens}
        body |= {name: getattr(sampling, name) for name in _FIELDS}
        for name, value in sampling.asked().items():
            if name == "logprob_start_len":
                raise self.unsupported(name)
            if name in _EXTENSIONS:
                body["min_tokens" if name == "min_new_tokens" else name] = value
        if sampling.stops:
            body["stop"] = list(sampling.stops)
        if sampling.json_schema is not None:
            schema = {"name": "schema", "schema": sampling.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        text = prompt.text
        if self._quoted(sampling):
            text, body["stop"] = text + '"', ['"']  # the closing quote ends it; both are put back
        elif sampling.dtype is not None:
            body["regex"] = dtype_regex(sampling.dtype)
        if not self.is_chat_model:
            if prompt.images:
                raise self.unsupported("images on a model that is no chat model")
            if sampling.return_logprob:
                body["logprobs"] = sampling.top_logprobs_num or 0
            return "/completions", {**body, "prompt": text}
        if sampling.return_logprob:
            body |= {"logprobs": True, "top_logprobs": sampling.top_logprobs_num or 0}
        return "/chat/completions", {**body, "messages": self._messages(prompt)}

    def _quoted(self, sampling: Sampling) -> bool:
        """Whether the prompt opens a string for the model."""
        return not self.is_chat_model and sampling.dtype in (str, "str", "string")

    def _messages(self, prompt: Prompt) -> list[dict[str, Any]]:
        """Raises RequestError inside a turn: a chat model can't be made to continue one."""
        if prompt.role is None and not prompt.messages:
            return [{"role": "user", "content": prompt.text}]
        if prompt.role != "assistant" or prompt.turn.strip():
            raise RequestError(
                "on a chat model, gen() must come first in an assistant's turn; with "
                "@function(num_api_spec_tokens=...) a turn may mix text and gen()",
                code="unsupported_field",
                param="gen",
            )
        return prompt.messages

    async def select(self, prompt: Prompt, select: Select) -> ChoicesDecision:
        """Scores the choices by the log-probabilities of an echoed prompt, which not every endpoint gives."""
        if self.is_chat_model:
            raise self.unsupported("select() on a chat model, which gives no log-probabilities of given text")
        if select.method.requires_unconditional_logprobs:
            raise self.unsupported("choices methods that need unconditional log-probabilities")
        body = {
            "model": self.model_name,
            "prompt": [
                *([prompt.text] if prompt.text else []),
                *(prompt.text + one for one in select.choices),
            ],
            "max_tokens": 0,
            "temperature": 0.0,
            "echo": True,
            "logprobs": 0,
        }
        answer = await self._http.json("POST", "/completions" + self._query, body)
        self._count(answer.get("usage"))
        found = [one["logprobs"] for one in sorted(answer["choices"], key=lambda one: one["index"])]
        base = found.pop(0)["tokens"] if prompt.text else []
        inputs: list[list[Any]] = []
        for one in found:
            entries = [
                [lp, None, text] for lp, text in zip(one["token_logprobs"], one["tokens"], strict=True)
            ]
            inputs.append(entries[common_prefix(base, one["tokens"]) :] or entries[-1:])
        return select.decide(inputs)

    def _count(self, usage: Mapping[str, int] | None) -> None:
        if usage:
            with self._counting:
                self.token_usage.prompt_tokens += usage.get("prompt_tokens", 0)
                self.token_usage.completion_tokens += usage.get("completion_tokens", 0)


def _lengthen(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Add the log-probabilities of one event: lists, of which an event may leave some out."""
    for name, value in part.items():
        whole[name] = (whole.get(name) or []) + value if isinstance(value, list) else whole.get(name, value)


def _text(choice: Mapping[str, Any], part: str) -> str:
    found = choice[part].get("content") if part in choice else choice.get("text")
    return found or ""
