"""What a client asks to be told beside an answer: token ids, and the native interface's meta_info."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trunkline.engine.frontend import Chunk, Prepared
from trunkline.engine.native import finish_dict
from trunkline.server.call import Json
from trunkline.server.fields import DETAILS


@dataclass(frozen=True)
class Details:
    """Of each choice. They come with its events, and are joined like them."""

    token_ids: bool
    prompt_token_ids: bool
    meta_info: bool

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Details:
        return cls(*(fields.get(name, False) for name in DETAILS))

    def needs_event(self, chunk: Chunk) -> bool:
        """Whether there is something to tell of a chunk even if it shows no text."""
        return self.token_ids and bool(chunk.token_ids)

    def before(self, prepared: Prepared) -> Json:
        """For the first event of a choice."""
        return {"prompt_token_ids": prepared.token_ids} if self.prompt_token_ids else {}

    def add(self, events: list[Json], chunk: Chunk, weight_version: str) -> None:
        """Put what a chunk has into its events."""
        if self.needs_event(chunk):
            events[0]["token_ids"] = chunk.token_ids
        if self.meta_info and chunk.finish is not None:
            events[-1]["meta_info"] = {
                "id": chunk.rid,
                "finish_reason": finish_dict(chunk.finish, chunk.completion_tokens),
                "prompt_tokens": chunk.prompt_tokens,
                "completion_tokens": chunk.completion_tokens,
                "cached_tokens": chunk.cached_tokens,
                "weight_version": weight_version,
                "num_retractions": chunk.retractions,
            }

    def join(self, whole: Json, event: Json) -> None:
        """Add what an event has to the whole choice."""
        if self.token_ids:
            whole["token_ids"] = [*whole.get("token_ids", ()), *event.get("token_ids", ())]
        whole |= {name: event[name] for name in ("prompt_token_ids", "meta_info") if name in event}
