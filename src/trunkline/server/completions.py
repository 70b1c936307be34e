"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import chain
from typing import Any

from trunkline.engine.constraint import take_constraint
from trunkline.engine.fields import read_fields
from trunkline.engine.frontend import Chunk, GenerationRequest, Prepared
from trunkline.engine.native import cache_salt, request_ids
from trunkline.engine.usage import Usage
from trunkline.server.call import Json, ServedModel, includes_usage, usage_dict
from trunkline.server.details import Details
from trunkline.server.endpoint import Access, Endpoint, Parts
from trunkline.server.fields import COMPLETION_FIELDS
from trunkline.server.respond import generation
from trunkline.text.detokenizer import Detokenizer
from trunkline.text.tokenizer import Tokenizer
from trunkline.types import LogprobParams, RequestError, TokenLogprobs

DEFAULT_MAX_TOKENS = 16


def endpoints(parts: Parts) -> list[Endpoint]:
    handler = generation(parse_completion, parts)
    return [
        Endpoint(
            "/v1/completions",
            ("POST",),
            handler,
            Access.USER,
            COMPLETION_FIELDS,
            summary="What follows a text",
        )
    ]


_EMPTY: Mapping[str, Any] = {
    "index": 0,
    "text": "",
    "logprobs": None,
    "finish_reason": None,
    "matched_stop": None,
}


@dataclass(frozen=True, kw_only=True)
class CompletionCall:
    """A parsed completion request."""

    requests: list[GenerationRequest]
    stream: bool
    include_usage: bool
    echo: bool
    details: Details
    names: Mapping[str, str]
    model: ServedModel

    async def events(
        self, batch: Sequence[Prepared], chunks: AsyncGenerator[Chunk, None]
    ) -> AsyncGenerator[Json, None]:
        n = batch[0].params.n
        usage = Usage(n)
        base = {
            "id": batch[0].request.rid,
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.model.name,
        }
        choices: dict[int, _Choice] = {}
        async with aclosing(chunks):
            async for chunk in chunks:
                usage.add(chunk)
                choice = choices.get(chunk.index)
                if choice is None:
                    prepared = batch[chunk.index // n]
                    before = self.details.before(prepared)
                    choice = choices[chunk.index] = _Choice(prepared, self.model.tokenizer, self.echo, before)
                event = choice.event(chunk, self.details.needs_event(chunk))
                if event is not None:
                    self.details.add([event], chunk, self.model.weight_version)
                    yield {**base, "choices": [event]}
        if self.include_usage or not self.stream:
            yield {**base, "choices": [], "usage": usage_dict(usage)}

    def join(self, events: Sequence[Json]) -> Json:
        joined: dict[int, Json] = {}
        for event in chain.from_iterable(event["choices"] for event in events):
            whole = joined.setdefault(event["index"], {**_EMPTY, "index": event["index"]})
            whole["text"] += event["text"]
            if event["logprobs"] is not None:
                lists = whole["logprobs"] or {name: [] for name in event["logprobs"]}
                whole["logprobs"] = {name: lists[name] + new for name, new in event["logprobs"].items()}
            whole |= {name: event[name] for name in ("finish_reason", "matched_stop")}
            self.details.join(whole, event)
        return {**events[-1], "choices": [joined[index] for index in sorted(joined)]}


class _Choice:
    """One completion on its way to events."""

    def __init__(self, prepared: Prepared, tokenizer: Tokenizer, echo: bool, before: Json) -> None:
        """`before`: what the first event has besides."""
        self._tokenizer = tokenizer
        self._before = before
        self._echo = _prompt_text(prepared, tokenizer) if echo else ""
        skip = prepared.params.skip_special_tokens
        self._offsets = Detokenizer(tokenizer, skip_special_tokens=skip, at_start=echo)
        self._offset = 0

    def event(self, chunk: Chunk, always: bool) -> Json | None:
        """None when there is nothing to say yet, unless `always`."""
        text, self._echo = self._echo + chunk.text, ""
        tokens = (chunk.prompt_logprobs or []) + (chunk.logprobs or [])
        if not (text or tokens or chunk.finish or always):
            return None
        before, self._before = self._before, {}
        return {
            **before,
            "index": chunk.index,
            "text": text,
            "logprobs": self._logprobs(tokens) if tokens else None,
            "finish_reason": None if chunk.finish is None else chunk.finish.kind,
            "matched_stop": None if chunk.finish is None else chunk.finish.matched,
        }

    def _logprobs(self, tokens: Sequence[TokenLogprobs]) -> Json:
        return {
            "tokens": [self._label(token.token_id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [self._next_offset(token.token_id) for token in tokens],
        }

    def _top(self, token: TokenLogprobs) -> dict[str, float] | None:
        """The most likely tokens and the chosen one."""
        if token.logprob is None:
            return None
        return {
            self._label(token_id): logprob
            for token_id, logprob in [*token.top, (token.token_id, token.logprob)]
        }

    def _next_offset(self, token_id: int) -> int:
        offset = self._offset
        self._offset += len(self._offsets.feed(token_id))
        return offset

    def _label(self, token_id: int) -> str:
        """Text of a token; its bytes if it is only a part of a character."""
        piece = self._tokenizer.piece(token_id)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _prompt_text(prepared: Prepared, tokenizer: Tokenizer) -> str:
    prompt = prepared.request.prompt
    if isinstance(prompt, str):
        return prompt
    return tokenizer.decode(prompt, skip_special_tokens=prepared.params.skip_special_tokens)


def parse_completion(body: Mapping[str, Any], model: ServedModel) -> CompletionCall:
    """Check a request. Raises RequestError."""
    fields = read_fields(COMPLETION_FIELDS, body)
    model.check_name(fields.get("model"))
    if "prompt" not in fields:
        raise RequestError("prompt is missing", code="missing_field", param="prompt")
    prompts, _ = fields["prompt"]
    echo = fields.get("echo", False)
    logprobs = None
    if "logprobs" in fields:
        logprobs = LogprobParams(prompt_start=0 if echo else None, top_n=fields["logprobs"])
    constraint = take_constraint(fields)
    params = model.sampling_params(fields, max_new_tokens=DEFAULT_MAX_TOKENS)
    requests = [
        GenerationRequest(
            rid=rid,
            prompt=prompt,
            params=params,
            logprobs=logprobs,
            cache_salt=cache_salt(fields),
            priority=fields.get("priority"),
            explain_prefix=fields.get("return_prefix_miss", False),
            clip_output="max_tokens" not in fields,
            constraint=constraint,
        )
        for rid, prompt in zip(request_ids(fields, "cmpl", len(prompts)), prompts, strict=True)
    ]
    return CompletionCall(
        requests=requests,
        stream=fields.get("stream", False),
        include_usage=includes_usage(fields),
        details=Details.of(fields),
        echo=echo,
        names={
            "input_ids": "prompt",
            "max_new_tokens": "max_tokens",
            "min_new_tokens": "min_tokens",
            "sampling_seed": "seed",
        },
        model=model,
    )
