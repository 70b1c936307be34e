"""Texts to vectors: what POST /encode, POST /v1/embeddings and `Engine.encode` share. Shapes are SGLang's."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trunkline.engine.fields import INT32_MAX, Flag, Number, Rule, Text, Unsupported, read_fields
from trunkline.engine.frontend import Chunk, GenerationRequest, Prepared
from trunkline.engine.native import PerPrompt, Prompts, cache_salt, finish_dict
from trunkline.types import Pooling, RequestError, SamplingParams

MAX_HIDDEN = 2**20  # bound on `dimensions`, before the model's own
_NO_MEDIA = "this server takes text only"

Vector = npt.NDArray[np.float32]

DIMENSIONS = Number(1, MAX_HIDDEN, integer=True)
ENCODE_FIELDS: Mapping[str, Rule] = {
    "text": Prompts(texts=True, ids=False),
    "input_ids": Prompts(texts=False, ids=True),
    "rid": PerPrompt(Text(longest=256, shortest=1)),
    "dimensions": DIMENSIONS,
    "priority": Number(-INT32_MAX, INT32_MAX, integer=True),
    "extra_key": Text(),
    "cache_salt": Text(),
    "return_prompt_token_ids": Flag(),
    "input_embeds": Unsupported(),
    **dict.fromkeys(("image_data", "video_data", "audio_data", "modalities"), Unsupported(([],), _NO_MEDIA)),
    "sampling_params": Unsupported(({},), "a vector is not sampled"),
    "is_cross_encoder_request": Unsupported((False,), "use /v1/rerank"),
    "lora_path": Unsupported(),
    "routing_key": Unsupported(),
    "return_pooled_hidden_states": Unsupported((False,)),
    **dict.fromkeys(("embed_override_token_id", "embed_overrides"), Unsupported()),
    **dict.fromkeys(("multi_item_delimiter_indices", "token_indices_to_pool"), Unsupported()),
}


@dataclass(frozen=True, kw_only=True)
class EncodeCall:
    """A parsed call. `is_list`: the answer is a list, one entry for each text."""

    requests: list[GenerationRequest]
    is_list: bool
    dimensions: int | None
    return_prompt_ids: bool


def parse_encode(body: Mapping[str, Any], pooling: Pooling) -> EncodeCall:
    """Raises RequestError for anything that can't be honored exactly as written."""
    fields = read_fields(ENCODE_FIELDS, body)
    if ("text" in fields) == ("input_ids" in fields):
        raise RequestError("give exactly one of text and input_ids", code="invalid_value", param="text")
    prompts, batch = fields["text"] if "text" in fields else fields["input_ids"]
    rule = ENCODE_FIELDS["rid"]
    assert isinstance(rule, PerPrompt)
    rids = rule.spread(fields.get("rid"), "rid", len(prompts), batch)
    if batch and isinstance(fields.get("rid"), str):
        rids = [f"{fields['rid']}-{i}" for i in range(len(prompts))]
    return EncodeCall(
        requests=[
            vector_request(rid or uuid.uuid4().hex, prompt, pooling, fields)
            for rid, prompt in zip(rids, prompts, strict=True)
        ],
        is_list=batch,
        dimensions=fields.get("dimensions"),
        return_prompt_ids=fields.get("return_prompt_token_ids", False),
    )


def vector_request(
    rid: str, prompt: str | list[int], pooling: Pooling, fields: Mapping[str, Any]
) -> GenerationRequest:
    """What yields the vector of one text. `fields`: those of its call that also other requests have."""
    return GenerationRequest(
        rid=rid,
        prompt=prompt,
        params=SamplingParams(max_new_tokens=0, temperature=0.0),
        cache_salt=cache_salt(fields),
        priority=fields.get("priority"),
        pooling=pooling,
    )


def check_dimensions(dimensions: int | None, hidden_size: int) -> None:
    if dimensions is not None and dimensions > hidden_size:
        raise RequestError(
            f"dimensions is {dimensions}; this model's vectors have {hidden_size}: ask for at most so many",
            code="out_of_range",
            param="dimensions",
        )


def unit_vector(embedding: bytes, dimensions: int | None = None) -> Vector:
    """The first `dimensions` numbers of a pooled vector, scaled to length 1 (cut first, as models that were
    trained for it expect). A vector of zeros stays one."""
    vector = np.frombuffer(embedding, "<f4")[:dimensions].astype(np.float64)
    length = float(np.sqrt(np.square(vector).sum()))
    return (vector / (length or 1.0)).astype(np.float32)


async def last_chunks(chunks: AsyncGenerator[Chunk, None], count: int) -> list[Chunk]:
    """The last chunk of each of `count` completions. Raises RequestError for one that was aborted."""
    found: dict[int, Chunk] = {}
    async with aclosing(chunks):
        async for chunk in chunks:
            if chunk.finish is None:
                continue
            if chunk.finish.kind == "abort":
                raise RequestError("the request was aborted", code="aborted", status=499)
            found[chunk.index] = chunk
    return [found[index] for index in range(count)]


async def vectors_of(
    call: EncodeCall, batch: Sequence[Prepared], chunks: AsyncGenerator[Chunk, None], weight_version: str
) -> Any:
    """The whole answer of a call."""
    started = time.monotonic()
    answers = []
    for prepared, chunk in zip(batch, await last_chunks(chunks, len(batch)), strict=True):
        assert chunk.finish is not None
        answer: dict[str, Any] = {
            "embedding": unit_vector(chunk.embedding, call.dimensions).tolist(),
            "meta_info": {
                "id": chunk.rid,
                "finish_reason": finish_dict(chunk.finish, 0),
                "prompt_tokens": chunk.prompt_tokens,
                "cached_tokens": chunk.cached_tokens,
                "weight_version": weight_version,
                "num_retractions": chunk.retractions,
                "e2e_latency": time.monotonic() - started,
            },
        }
        if call.return_prompt_ids:
            answer["prompt_token_ids"] = prepared.token_ids
        answers.append(answer)
    return answers if call.is_list else answers[0]
