"""POST /generate: the native interface (its request and response are in `engine/native.py`)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trunkline.engine.fields import SAMPLING_FIELDS
from trunkline.engine.frontend import Chunk, GenerationRequest, Prepared
from trunkline.engine.native import GENERATE_FIELDS, NativeCall, answers, join_answers, parse_call
from trunkline.server.call import Json, ServedModel
from trunkline.server.endpoint import Access, Endpoint, Parts
from trunkline.server.respond import generation


def endpoints(parts: Parts) -> list[Endpoint]:
    handler = generation(parse_generate, parts)
    summary = "Generate, with all that the native interface offers"
    return [Endpoint("/generate", ("POST", "PUT"), handler, Access.USER, GENERATE_FIELDS, summary=summary)]


@dataclass(frozen=True, kw_only=True)
class GenerateCall:
    """A parsed /generate request."""

    call: NativeCall
    model: ServedModel

    @property
    def requests(self) -> list[GenerationRequest]:
        return self.call.requests

    @property
    def stream(self) -> bool:
        return self.call.stream

    @property
    def names(self) -> Mapping[str, str]:
        prompt = "input_ids" if isinstance(self.requests[0].prompt, list) else "text"
        return {"prompt": prompt, **{name: f"sampling_params.{name}" for name in SAMPLING_FIELDS}}

    def events(
        self, batch: Sequence[Prepared], chunks: AsyncGenerator[Chunk, None]
    ) -> AsyncGenerator[Json, None]:
        return answers(self.call, batch, chunks, self.model.tokenizer, self.model.weight_version)

    def join(self, events: Sequence[Json]) -> Any:
        return join_answers(self.call, events)


def parse_generate(body: Mapping[str, Any], model: ServedModel) -> GenerateCall:
    """Check a request. Raises RequestError."""
    return GenerateCall(call=parse_call(body, model.reasoning), model=model)
