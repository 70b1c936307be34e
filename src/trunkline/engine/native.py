"""The native request and response: what POST /generate and `Engine.generate` share. Shapes are SGLang's."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from trunkline.engine.constraint import GRAMMAR_FIELDS, take_constraint
from trunkline.engine.fields import (
    INT32_MAX,
    SAMPLING_FIELDS,
    TOKEN_IDS,
    Flag,
    Items,
    Number,
    Object,
    Rule,
    Text,
    Unsupported,
    read_fields,
    wrong_type,
)
from trunkline.engine.frontend import Chunk, GenerationRequest, Prepared
from trunkline.engine.sessions import SessionRef
from trunkline.text.reasoning import Reasoning, ReasoningFormat
from trunkline.text.tokenizer import Tokenizer
from trunkline.types import (
    MAX_TOP_LOGPROBS,
    FinishReason,
    LogprobParams,
    RequestError,
    SamplingParams,
    TokenLogprobs,
)

MAX_BATCH = 65536  # prompts in one call

Entry = list[float | int | str | None]  # [logprob, token id, text]


@dataclass(frozen=True)
class Prompts(Rule):
    """One prompt or a list of them: texts, or lists of token ids.

    Reads as (prompts, whether it was a list).
    """

    texts: bool
    ids: bool

    def read(self, value: Any, name: str) -> tuple[list[str | list[int]], bool]:
        if self._is_prompt(value):
            return [value], False
        if isinstance(value, list) and value and len(value) <= MAX_BATCH and all(map(self._is_prompt, value)):
            return value, True
        kinds = ["text"] * self.texts + ["list of token ids"] * self.ids
        raise wrong_type(name, f"a {' or a '.join(kinds)}, or a list of such (1 to {MAX_BATCH})", value)

    def _is_prompt(self, value: Any) -> bool:
        if isinstance(value, str):
            return self.texts
        return (
            self.ids and isinstance(value, list) and bool(value) and all(type(item) is int for item in value)
        )

    def schema(self) -> dict[str, Any]:
        ids = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
        one = [{"type": "string"}] * self.texts + [ids] * self.ids
        several = {"type": "array", "items": {"anyOf": one}, "minItems": 1, "maxItems": MAX_BATCH}
        return {"anyOf": [*one, several]}


@dataclass(frozen=True)
class PerPrompt(Rule):
    """One value for all prompts of a call, or a list with a value (or null) for each.

    Read by `spread`, when the number of prompts is known.
    """

    of: Rule

    def spread(self, value: Any, name: str, count: int, batch: bool) -> list[Any]:
        """`count` values; absent ones are None."""
        if not (batch and self._is_list(value)):
            return [None if value is None else self.of.read(value, name)] * count
        if len(value) != count:
            raise RequestError(
                f"{name} has {len(value)} entries for {count} prompts", code="length_mismatch", param=name
            )
        return [None if item is None else self.of.read(item, f"{name}[{i}]") for i, item in enumerate(value)]

    def _is_list(self, value: Any) -> bool:
        if not isinstance(value, list):
            return False
        return not isinstance(self.of, Items) or any(isinstance(item, list) for item in value)

    def schema(self) -> dict[str, Any]:
        one = self.of.schema()
        return {"anyOf": [one, {"type": "array", "items": {"anyOf": [one, {"type": "null"}]}}]}


SESSION_ID = Text(longest=256, shortest=1)
SESSION_PARAMS = Object(
    {
        "id": SESSION_ID,
        "rid": Text(longest=256, shortest=1),
        "offset": Number(-INT32_MAX, INT32_MAX, integer=True),
        "replace": Flag(),
        "drop_previous_output": Flag(),
    }
)
OPEN_SESSION_FIELDS: Mapping[str, Rule] = {
    "capacity_of_str_len": Number(0, INT32_MAX, integer=True),
    "session_id": SESSION_ID,
    "streaming": Flag(),
    "timeout": Number(0, 604800, above=True),
}
CLOSE_SESSION_FIELDS: Mapping[str, Rule] = {"session_id": SESSION_ID}
_SAMPLING: Mapping[str, Rule] = {**SAMPLING_FIELDS, **GRAMMAR_FIELDS}
MAX_THINKING = Number(0, INT32_MAX, integer=True)
_NO_MEDIA = "this server takes text only"

GENERATE_FIELDS: Mapping[str, Rule] = {
    "text": Prompts(texts=True, ids=False),
    "input_ids": Prompts(texts=False, ids=True),
    "sampling_params": PerPrompt(Object(_SAMPLING)),
    "stream": Flag(),
    "rid": PerPrompt(Text(longest=256, shortest=1)),
    "return_logprob": PerPrompt(Flag()),
    "logprob_start_len": PerPrompt(Number(-1, INT32_MAX, integer=True)),
    "top_logprobs_num": PerPrompt(Number(0, MAX_TOP_LOGPROBS, integer=True)),
    "token_ids_logprob": PerPrompt(TOKEN_IDS),
    "return_text_in_logprobs": Flag(),
    "return_prompt_token_ids": Flag(),
    "return_forced": Flag(),
    "return_prefix_miss": Flag(),
    "priority": Number(-INT32_MAX, INT32_MAX, integer=True),
    "extra_key": Text(),
    "cache_salt": Text(),
    "input_embeds": Unsupported(),
    **dict.fromkeys(("image_data", "video_data", "audio_data", "modalities"), Unsupported(([],), _NO_MEDIA)),
    **dict.fromkeys(("mm_hashes", "mm_content_hashes", "video_config", "mm_processor_kwargs"), Unsupported()),
    **dict.fromkeys(("images_config", "max_dynamic_patch", "min_dynamic_patch"), Unsupported()),
    "use_audio_in_video": Unsupported((False,), _NO_MEDIA),
    "return_flat_raw_top_logprobs": Unsupported((False,)),
    "return_flat_raw_top_logprobs_output": Unsupported((False,)),
    "return_flat_raw_top_logprobs_b64": Unsupported((False,)),
    "return_sampling_mask": Unsupported((False,)),
    "sampling_logprobs_mode": Unsupported(),
    "return_hidden_states": Unsupported((False,)),
    "return_routed_experts": Unsupported((False,)),
    "routed_experts_start_len": Unsupported((0,)),
    "return_indexer_topk": Unsupported((False,)),
    "return_entropy": Unsupported((False,)),
    "session_params": PerPrompt(SESSION_PARAMS),
    "session_id": SESSION_ID,
    "lora_path": Unsupported(),
    "custom_logit_processor": Unsupported(
        (), "it would run code of the request; use logit_bias, or a sampling parameter"
    ),
    "routing_key": Unsupported(),
    "conversation_id": Unsupported(),
    "custom_labels": Unsupported(),
    "no_logs": Unsupported((False,)),
    "log_metrics": Unsupported((True,)),
    "background": Unsupported((False,)),
    "require_reasoning": Flag(),
    "max_thinking_tokens": MAX_THINKING,
    "watermark": Unsupported((False,)),
    **dict.fromkeys(
        ("bootstrap_host", "bootstrap_port", "bootstrap_room", "bootstrap_pair_key"), Unsupported()
    ),
    **dict.fromkeys(("decode_tp_size", "routed_dp_rank", "data_parallel_rank"), Unsupported()),
    **dict.fromkeys(("disagg_prefill_dp_rank", "kv_hints", "external_trace_header"), Unsupported()),
    **dict.fromkeys(("multi_item_delimiter_indices", "token_indices_to_pool"), Unsupported()),
}


@dataclass(frozen=True, kw_only=True)
class NativeCall:
    """A parsed call. `is_list`: the answer is a list, one entry per completion."""

    requests: list[GenerationRequest]
    is_list: bool
    stream: bool
    text_in_logprobs: bool
    return_prompt_ids: bool
    return_forced: bool = False
    body: Mapping[str, Any]  # as it was sent


def parse_call(body: Mapping[str, Any], reasoning: ReasoningFormat | None) -> NativeCall:
    """`reasoning`: how the model writes it. Raises RequestError for anything that can't be honoured exactly
    as written."""
    fields = read_fields(GENERATE_FIELDS, body)
    if ("text" in fields) == ("input_ids" in fields):
        raise RequestError("give exactly one of text and input_ids", code="invalid_value", param="text")
    prompts, batch = fields["text"] if "text" in fields else fields["input_ids"]
    count = len(prompts)

    def spread(name: str) -> list[Any]:
        rule = GENERATE_FIELDS[name]
        assert isinstance(rule, PerPrompt)
        return rule.spread(fields.get(name), name, count, batch)

    given_params = [dict(given or {}) for given in spread("sampling_params")]
    constraints = [take_constraint(given, "sampling_params.") for given in given_params]
    most = fields.get("max_thinking_tokens")
    reasons = _reasoning(fields, reasoning)
    if most is not None and reasons is None:
        raise RequestError(
            "max_thinking_tokens needs require_reasoning: true",
            code="invalid_value",
            param="max_thinking_tokens",
        )
    params = [sampling_params(given) for given in given_params]
    if len({one.n for one in params}) > 1:
        raise RequestError(
            "all prompts of a call share one n", code="invalid_value", param="sampling_params.n"
        )
    sessions = [_session(given, fields.get("session_id")) for given in spread("session_params")]
    rids = spread("rid")
    if batch and isinstance(fields.get("rid"), str):
        rids = [f"{fields['rid']}-{i}" for i in range(count)]
    logprobs = map(
        _logprob_params,
        *map(spread, ("return_logprob", "logprob_start_len", "top_logprobs_num", "token_ids_logprob")),
    )
    requests = [
        GenerationRequest(
            rid=rid or uuid.uuid4().hex,
            prompt=prompt,
            params=one,
            logprobs=wanted,
            cache_salt=cache_salt(fields),
            priority=fields.get("priority"),
            clip_output="max_new_tokens" not in given,
            constraint=constraint,
            reasoning=reasons,
            max_thinking_tokens=most,
            session=session,
            explain_prefix=fields.get("return_prefix_miss", False),
        )
        for rid, prompt, one, wanted, given, constraint, session in zip(
            rids, prompts, params, logprobs, given_params, constraints, sessions, strict=True
        )
    ]
    return NativeCall(
        requests=requests,
        is_list=batch or params[0].n > 1,
        stream=fields.get("stream", False),
        text_in_logprobs=fields.get("return_text_in_logprobs", False),
        return_prompt_ids=fields.get("return_prompt_token_ids", False),
        return_forced=fields.get("return_forced", False),
        body=body,
    )


def _session(given: Mapping[str, Any] | None, session_id: str | None) -> SessionRef | None:
    if given is None:
        return None if session_id is None else SessionRef(id=session_id, latest=True)
    if session_id is not None:
        raise RequestError(
            "session_params and session_id exclude each other: send one of them",
            code="invalid_value",
            param="session_id",
        )
    if "id" not in given:
        raise RequestError("session_params.id is missing", code="missing_field", param="session_params.id")
    return SessionRef(
        id=given["id"],
        rid=given.get("rid"),
        offset=given.get("offset"),
        replace=given.get("replace", False),
        drop_output=given.get("drop_previous_output", False),
    )


def _reasoning(fields: Mapping[str, Any], found: ReasoningFormat | None) -> Reasoning | None:
    """The answer's text stays whole."""
    if not fields.get("require_reasoning"):
        return None
    if found is None:
        raise RequestError(
            "require_reasoning: this server has no reasoning parser (--reasoning-parser sets one)",
            code="no_reasoning",
            param="require_reasoning",
        )
    return Reasoning(found, inside=True, gates=True, separate=False)


def sampling_params(fields: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> SamplingParams:
    """SamplingParams of fields that passed SAMPLING_FIELDS, over `defaults`."""
    values = {**(defaults or {}), **fields}
    values |= {
        name: tuple(values[name]) for name in ("stop", "stop_regex", "stop_token_ids") if name in values
    }
    return SamplingParams(**values)


def request_ids(fields: Mapping[str, Any], prefix: str, count: int) -> list[str]:
    """Ids of `count` prompts: the client's, or new ones."""
    rid = fields.get("rid") or f"{prefix}-{uuid.uuid4().hex}"
    return [rid] if count == 1 else [f"{rid}-{i}" for i in range(count)]


def cache_salt(fields: Mapping[str, Any]) -> str:
    """One salt of the two fields that separate caches; different pairs give different salts."""
    pair = [fields.get(name, "") for name in ("extra_key", "cache_salt")]
    return json.dumps(pair) if any(pair) else ""


def _logprob_params(
    wanted: bool | None, start: int | None, top: int | None, token_ids: list[int] | None
) -> LogprobParams | None:
    if not wanted:
        asked = [("top_logprobs_num", top), ("token_ids_logprob", token_ids)]
        name = next((name for name, value in asked if value), None)
        if name is not None:
            raise RequestError(f"{name} needs return_logprob: true", code="invalid_value", param=name)
        return None
    return LogprobParams(
        prompt_start=None if start is None or start < 0 else start,
        top_n=top or 0,
        token_ids=tuple(token_ids or ()),
    )


class NativeOutput:
    """One completion as the native response shows it, kept up to date chunk by chunk."""

    def __init__(
        self, call: NativeCall, prepared: Prepared, tokenizer: Tokenizer, weight_version: str
    ) -> None:
        self._started = time.monotonic()
        self._call = call
        self._prepared = prepared
        self._tokenizer = tokenizer
        self._weight_version = weight_version
        self._text: list[str] = []
        self._ids: list[int] = []
        self._forced: list[int] = []
        self._input: list[TokenLogprobs] | None = None
        self._output: list[TokenLogprobs] | None = None
        self._last: Chunk | None = None
        self._miss: dict[str, Any] | None = None
        self._latency = 0.0

    def add(self, chunk: Chunk) -> None:
        self._text += (chunk.reasoning, chunk.text)
        self._forced += (len(self._ids) + index for index in chunk.forced)
        self._ids += chunk.token_ids
        if chunk.prompt_logprobs is not None:
            self._input = chunk.prompt_logprobs
        if chunk.logprobs is not None:
            self._output = (self._output or []) + chunk.logprobs
        self._miss = chunk.prefix_miss or self._miss
        self._last = chunk
        self._latency = time.monotonic() - self._started

    def as_dict(self) -> dict[str, Any]:
        """Everything so far; `text` and `output_ids` are cumulative."""
        chunk = self._last
        assert chunk is not None
        meta: dict[str, Any] = {
            "id": chunk.rid,
            "finish_reason": None
            if chunk.finish is None
            else finish_dict(chunk.finish, chunk.completion_tokens),
            "prompt_tokens": chunk.prompt_tokens,
            "completion_tokens": chunk.completion_tokens,
            "cached_tokens": chunk.cached_tokens,
            "weight_version": self._weight_version,
            "num_retractions": chunk.retractions,
        }
        if chunk.reasoning_tokens is not None:
            meta["reasoning_tokens"] = chunk.reasoning_tokens
        if self._prepared.request.constraint is not None:
            meta["forced_tokens"] = chunk.forced_tokens
        if self._call.return_forced:
            meta["forced"] = list(self._forced)
        if chunk.finish is not None:
            meta["e2e_latency"] = self._latency
        if self._miss is not None:
            meta["prefix_miss"] = self._miss
        if self._output is not None:
            meta |= self._logprobs("output", self._output)
            meta["output_token_logprobs_length"] = len(self._output)
            meta |= self._logprobs("input", self._input or [])
        answer = {"text": "".join(self._text), "output_ids": list(self._ids), "meta_info": meta}
        if self._call.return_prompt_ids:
            answer["prompt_token_ids"] = self._prepared.token_ids
        return answer

    def _logprobs(self, side: str, tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
        lists: dict[str, Any] = {
            f"{side}_token_logprobs": [self._entry(token.logprob, token.token_id) for token in tokens]
        }
        wanted = self._prepared.request.logprobs
        if wanted is not None and wanted.top_n:
            lists[f"{side}_top_logprobs"] = [self._alternatives(token.top) for token in tokens]
        if wanted is not None and wanted.token_ids:
            lists[f"{side}_token_ids_logprobs"] = [self._alternatives(token.chosen) for token in tokens]
        return lists

    def _alternatives(self, pairs: Sequence[tuple[int, float]]) -> list[Entry] | None:
        return [self._entry(logprob, token_id) for token_id, logprob in pairs] or None

    def _entry(self, logprob: float | None, token_id: int) -> Entry:
        return [
            logprob,
            token_id,
            self._tokenizer.token_text(token_id) if self._call.text_in_logprobs else None,
        ]


async def answers(
    call: NativeCall,
    batch: Sequence[Prepared],
    chunks: AsyncGenerator[Chunk, None],
    tokenizer: Tokenizer,
    weight_version: str,
) -> AsyncGenerator[dict[str, Any], None]:
    """An updated answer for each chunk, or for each last chunk if the call does not stream. Those of a list
    carry "index"."""
    outputs = [
        NativeOutput(call, prepared, tokenizer, weight_version)
        for prepared in batch
        for _ in range(prepared.params.n)
    ]
    async with aclosing(chunks):
        async for chunk in chunks:
            outputs[chunk.index].add(chunk)
            if call.stream or chunk.finish is not None:
                answer = outputs[chunk.index].as_dict()
                yield {**answer, "index": chunk.index} if call.is_list else answer


def join_answers(call: NativeCall, events: Sequence[dict[str, Any]]) -> Any:
    """The whole response, from what `answers` gave."""
    if not call.is_list:
        return events[-1]
    last = {event["index"]: event for event in events}
    return [{name: value for name, value in last[i].items() if name != "index"} for i in sorted(last)]


def finish_dict(finish: FinishReason, completion_tokens: int) -> dict[str, Any]:
    """SGLang's shape of a finish reason."""
    if finish.kind == "length":
        return {"type": "length", "length": completion_tokens}
    if finish.kind == "stop":
        return {"type": "stop", "matched": finish.matched}
    return {
        "type": "abort",
        "message": finish.message or "aborted",
        "status_code": finish.status,
        "err_type": finish.code,
    }
