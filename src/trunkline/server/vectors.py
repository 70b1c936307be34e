"""Texts to vectors: POST /v1/embeddings and POST /encode. What would need a trained head is refused."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from trunkline.engine.fields import OneOf, Rule, Text, Unsupported, read_fields
from trunkline.engine.frontend import Chunk, GenerationRequest, Prepared
from trunkline.engine.native import Prompts, request_ids
from trunkline.engine.vectors import (
    DIMENSIONS,
    ENCODE_FIELDS,
    EncodeCall,
    check_dimensions,
    last_chunks,
    parse_encode,
    unit_vector,
    vector_request,
    vectors_of,
)
from trunkline.server.call import Json, ServedModel
from trunkline.server.endpoint import Access, Endpoint, Parts
from trunkline.server.respond import generation
from trunkline.types import Pooling, RequestError

MAX_INPUTS = 2048  # OpenAI's own bound

EMBEDDING_FIELDS: Mapping[str, Rule] = {
    "model": Text(),
    "input": Prompts(texts=True, ids=True),
    "encoding_format": OneOf(("float", "base64")),
    "dimensions": DIMENSIONS,
    **{name: ENCODE_FIELDS[name] for name in ("priority", "extra_key", "cache_salt")},
    "rid": Text(longest=256, shortest=1),
    "user": Text(),
    "lora_path": Unsupported(),
}


def endpoints(parts: Parts) -> list[Endpoint]:
    pooling, hidden = parts.frontend.config.model.pooling, parts.frontend.ready.hidden_size
    embeddings = generation(partial(parse_embeddings, pooling=pooling, hidden_size=hidden), parts)
    encode = generation(partial(parse_native, pooling=pooling, hidden_size=hidden), parts)
    refused = "Refused: a decoder has no classification head"
    return [
        Endpoint(
            "/v1/embeddings", ("POST",), embeddings, Access.USER, EMBEDDING_FIELDS, summary="Vectors of texts"
        ),
        Endpoint(
            "/encode",
            ("POST", "PUT"),
            encode,
            Access.USER,
            ENCODE_FIELDS,
            summary="Vectors of texts, in SGLang's terms",
        ),
        Endpoint("/classify", ("POST", "PUT"), _classify, Access.USER, summary=refused),
        Endpoint("/v1/classify", ("POST",), _classify, Access.USER, summary=refused),
    ]


async def _classify(request: Request) -> Response:
    raise RequestError(
        "this model has no classification head: score the labels' tokens with /v1/score",
        code="unsupported_route",
        param="model",
    )


@dataclass(frozen=True, kw_only=True)
class EmbeddingsCall:
    """A parsed /v1/embeddings request."""

    requests: list[GenerationRequest]
    dimensions: int | None
    as_base64: bool
    model: ServedModel
    stream: bool = False

    @property
    def names(self) -> Mapping[str, str]:
        return {"prompt": "input", "input_ids": "input"}

    async def events(
        self, batch: Sequence[Prepared], chunks: AsyncGenerator[Chunk, None]
    ) -> AsyncGenerator[Json, None]:
        last = await last_chunks(chunks, len(batch))
        tokens = sum(chunk.prompt_tokens for chunk in last)
        cached = sum(chunk.cached_tokens for chunk in last)
        yield {
            "object": "list",
            "data": await asyncio.to_thread(self._data, last),  # long lists of numbers take their time
            "model": self.model.name,
            "usage": {
                "prompt_tokens": tokens,
                "total_tokens": tokens,
                "prompt_tokens_details": {"cached_tokens": cached},
            },
        }

    def join(self, events: Sequence[Json]) -> Json:
        return events[-1]

    def _data(self, chunks: Sequence[Chunk]) -> list[Json]:
        return [
            {"object": "embedding", "index": index, "embedding": self._vector(chunk)}
            for index, chunk in enumerate(chunks)
        ]

    def _vector(self, chunk: Chunk) -> list[float] | str:
        vector = unit_vector(chunk.embedding, self.dimensions)
        if self.as_base64:
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        return [float(number) for number in vector.tolist()]


def parse_embeddings(
    body: Mapping[str, Any], model: ServedModel, *, pooling: Pooling, hidden_size: int
) -> EmbeddingsCall:
    """Check a request. Raises RequestError."""
    fields = read_fields(EMBEDDING_FIELDS, body)
    model.check_name(fields.get("model"))
    if "input" not in fields:
        raise RequestError("input is missing: send a text", code="missing_field", param="input")
    inputs, _ = fields["input"]
    if len(inputs) > MAX_INPUTS:
        raise RequestError(
            f"input has {len(inputs)} entries; it may have {MAX_INPUTS}", code="out_of_range", param="input"
        )
    check_dimensions(fields.get("dimensions"), hidden_size)
    return EmbeddingsCall(
        requests=[
            vector_request(rid, text, pooling, fields)
            for rid, text in zip(request_ids(fields, "embd", len(inputs)), inputs, strict=True)
        ],
        dimensions=fields.get("dimensions"),
        as_base64=fields.get("encoding_format") == "base64",
        model=model,
    )


@dataclass(frozen=True, kw_only=True)
class NativeEncodeCall:
    """A parsed /encode request."""

    call: EncodeCall
    model: ServedModel
    stream: bool = False

    @property
    def requests(self) -> list[GenerationRequest]:
        return self.call.requests

    @property
    def names(self) -> Mapping[str, str]:
        return {"prompt": "input_ids" if isinstance(self.requests[0].prompt, list) else "text"}

    async def events(
        self, batch: Sequence[Prepared], chunks: AsyncGenerator[Chunk, None]
    ) -> AsyncGenerator[Json, None]:
        yield {"answer": await vectors_of(self.call, batch, chunks, self.model.weight_version)}

    def join(self, events: Sequence[Json]) -> Any:
        return events[-1]["answer"]


def parse_native(
    body: Mapping[str, Any], model: ServedModel, *, pooling: Pooling, hidden_size: int
) -> NativeEncodeCall:
    """Check a request. Raises RequestError."""
    call = parse_encode(body, pooling)
    check_dimensions(call.dimensions, hidden_size)
    return NativeEncodeCall(call=call, model=model)
