"""The log of calls: what was asked and what came of it. Texts only from the level that asks for them on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec

from trunkline.config.schema import ObserveConfig
from trunkline.engine.effective import completion_dict, state_of
from trunkline.engine.frontend import Chunk
from trunkline.engine.journal import Completion, Journal, Record

WITH_PARAMETERS, WITH_BEGINNINGS, WITH_TEXTS = 1, 2, 3  # levels
BEGINNING = 2048  # characters of a text, or token ids, at level 2

log = logging.getLogger("trunkline.requests")


class RequestLog:
    """Observes the journal. Settings may change while it runs; they hold from the next call on."""

    def __init__(self, journal: Journal, config: ObserveConfig) -> None:
        self._journal = journal
        self.set(config.log_requests, config.log_requests_level, config.log_requests_format == "json")

    def set(self, on: bool, level: int, as_json: bool) -> None:
        self.on, self.level, self.as_json = on, level, as_json
        self._journal.keeps_texts = on and level >= WITH_BEGINNINGS

    def begun(self, record: Record) -> None:
        if self.on:
            self._write("request begun", self._asked(record))

    def news(self, record: Record, completion: Completion, chunk: Chunk, now: float) -> None:
        pass

    def over(self, record: Record) -> None:
        if self.on:
            self._write(f"request {state_of(record)}", self._came(record))

    def _write(self, message: str, fields: Mapping[str, Any]) -> None:
        if self.as_json:
            log.info("%s", msgspec.json.encode({"message": message, **fields}).decode())
        else:
            words = " ".join(f"{name}={_text(value)}" for name, value in fields.items())
            log.info("%s: %s", message, words, extra={"fields": fields})

    def _asked(self, record: Record) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "rid": record.key,
            "request_id": record.origin.request_id,
            "route": record.origin.route,
            "prompt_tokens": [prompt.num_tokens for prompt in record.prompts],
            "completions": len(record.completions),
        }
        if self.level >= WITH_PARAMETERS:
            fields["parameters"] = [msgspec.to_builtins(one.used, str_keys=True) for one in record.prompts]
        if self.level >= WITH_BEGINNINGS:
            most = BEGINNING if self.level < WITH_TEXTS else None
            fields["prompts"] = [prompt[:most] for prompt in record.texts]
        return fields

    def _came(self, record: Record) -> dict[str, Any]:
        seconds = (record.ended or record.started) - record.started
        fields: dict[str, Any] = {
            "rid": record.key,
            "request_id": record.origin.request_id,
            "route": record.origin.route,
            "status": record.status,
            "seconds": round(seconds, 6),
            "completions": [completion_dict(one) for one in record.completions],
        }
        if record.error is not None:
            fields["error"] = record.error.code
        if self.level >= WITH_BEGINNINGS:
            most = BEGINNING if self.level < WITH_TEXTS else None
            fields["outputs"] = ["".join(one.text)[:most] for one in record.completions]
        return fields


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value.isprintable() else msgspec.json.encode(value).decode()
