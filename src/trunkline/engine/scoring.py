"""How likely certain tokens are to follow certain texts: what POST /v1/score and `Engine.score` share.

Each item takes one step behind its prompt; what all prompts begin with is computed once, by the prefix cache.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from trunkline.engine.fields import INT32_MAX, Flag, Items, Number, Rule, Text, Unsupported, read_fields
from trunkline.engine.frontend import Chunk, GenerationRequest
from trunkline.engine.native import Prompts, cache_salt
from trunkline.engine.vectors import last_chunks
from trunkline.types import LogprobParams, RequestError, SamplingParams

MAX_LABELS = 1024

SCORE_FIELDS: Mapping[str, Rule] = {
    "model": Text(),
    "query": Prompts(texts=True, ids=True),
    "items": Prompts(texts=True, ids=True),
    "label_token_ids": Items(Number(0, INT32_MAX, integer=True), MAX_LABELS, fewest=1),
    "apply_softmax": Flag(),
    "item_first": Flag(),
    "temperature": Number(0, above=True),
    "rid": Text(longest=256, shortest=1),
    "priority": Number(-INT32_MAX, INT32_MAX, integer=True),
    "extra_key": Text(),
    "cache_salt": Text(),
    "user": Text(),
    "return_token_logprobs": Unsupported((False,), "use /generate with token_ids_logprob"),
    "return_pooled_hidden_states": Unsupported((False,)),
    "embed_override_token_id": Unsupported(),
    "embed_overrides": Unsupported(),
}


class ScoreResult(msgspec.Struct, frozen=True):
    """`scores`: of each item, a number for each label token. The token counts are of all items."""

    scores: list[list[float]]
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, kw_only=True)
class ScoreCall:
    """A parsed call: a prompt for each item. `temperature` None: probabilities among all tokens, instead of
    among the labels."""

    requests: list[GenerationRequest]
    temperature: float | None


def parse_score(body: Mapping[str, Any]) -> ScoreCall:
    """Raises RequestError for anything that can't be honored exactly as written."""
    fields = read_fields(SCORE_FIELDS, body)
    for name in ("query", "items", "label_token_ids"):
        if name not in fields:
            raise RequestError(f"{name} is missing", code="missing_field", param=name)
    queries, several = fields["query"]
    if several:
        raise RequestError(
            "query is a list: give one text, or its token ids", code="invalid_type", param="query"
        )
    items, _ = fields["items"]
    if any(isinstance(item, str) != isinstance(queries[0], str) for item in items):
        raise RequestError(
            "query and items must both be texts, or both be token ids", code="invalid_type", param="items"
        )
    softmax = fields.get("apply_softmax", False)
    if not softmax and fields.get("temperature", 1.0) != 1.0:
        raise RequestError(
            "temperature divides what the softmax is taken of: it needs apply_softmax: true",
            code="invalid_value",
            param="temperature",
        )
    first = fields.get("item_first", False)
    prompts = [item + queries[0] if first else queries[0] + item for item in items]
    rid = fields.get("rid") or uuid.uuid4().hex
    return ScoreCall(
        requests=[
            label_request(f"{rid}-{i}", prompt, tuple(fields["label_token_ids"]), fields)
            for i, prompt in enumerate(prompts)
        ],
        temperature=fields.get("temperature", 1.0) if softmax else None,
    )


def label_request(
    rid: str,
    prompt: str | list[int],
    labels: tuple[int, ...],
    fields: Mapping[str, Any],
    *,
    add_special_tokens: bool = True,
) -> GenerationRequest:
    """One step behind `prompt`, with the log-probabilities of `labels`."""
    return GenerationRequest(
        rid=rid,
        prompt=prompt,
        params=SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True, skip_special_tokens=False),
        logprobs=LogprobParams(token_ids=labels),
        cache_salt=cache_salt(fields),
        priority=fields.get("priority"),
        add_special_tokens=add_special_tokens,
    )


async def scores_of(call: ScoreCall, chunks: AsyncGenerator[Chunk, None]) -> ScoreResult:
    """The whole answer of a call."""
    last = await last_chunks(chunks, len(call.requests))
    return ScoreResult(
        scores=[label_scores(chunk, call.temperature) for chunk in last],
        prompt_tokens=sum(chunk.prompt_tokens for chunk in last),
        cached_tokens=sum(chunk.cached_tokens for chunk in last),
    )


def label_scores(chunk: Chunk, temperature: float | None) -> list[float]:
    """The probability of each label, among the labels, or with `temperature` None among all tokens."""
    assert chunk.logprobs is not None
    logprobs = [logprob for _, logprob in chunk.logprobs[0].chosen]
    return [math.exp(x) for x in logprobs] if temperature is None else softmax(logprobs, temperature)


def softmax(values: Sequence[float], temperature: float) -> list[float]:
    most = max(values)
    weights = [math.exp((value - most) / temperature) for value in values]
    total = math.fsum(weights)
    return [weight / total for weight in weights]
