"""Dumps of requests as lines of JSON, for looking at a crash and for `trunkline replay`.

Without permission for prompts a dump holds shapes: numbers as they are, strings as their lengths.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from trunkline import __version__
from trunkline.config.schema import EngineConfig
from trunkline.engine.effective import completion_dict, state_of
from trunkline.engine.frontend import Chunk
from trunkline.engine.journal import Completion, Journal, Record
from trunkline.types import RequestError

log = logging.getLogger(__name__)

FORMAT = 1
WINDOW = 300.0  # seconds before a crash whose calls are in its dump

# What is kept of a body without permission: objects under these names with their fields, and these strings.
_OPEN_OBJECTS = frozenset({"sampling_params", "messages", "stream_options", "options", "thinking"})
_OPEN_STRINGS = frozenset({"model", "rid", "role", "type", "tool_choice", "reasoning_effort"})


def shape_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """A body without anything that a user wrote."""
    return {name: _shape(name, value) for name, value in body.items()}


def _shape(name: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return value if name in _OPEN_STRINGS and len(value) <= 64 else {"characters": len(value)}
    if isinstance(value, list):
        if value and all(type(one) is int for one in value):
            return {"integers": len(value)}
        return [_shape(name, one) for one in value[:1000]]
    if isinstance(value, Mapping) and name in _OPEN_OBJECTS:
        return shape_of(value)
    return {"entries": len(value)} if isinstance(value, Mapping) else {"type": type(value).__name__}


def head_line(config: EngineConfig, reason: str, prompts: bool) -> dict[str, Any]:
    return {
        "trunkline_dump": FORMAT,
        "version": __version__,
        "written": time.time(),
        "reason": reason,
        "model": config.model.served_model_name,
        "weight_version": config.model.weight_version,
        "prompts": prompts,
    }


def call_line(record: Record, prompts: bool) -> dict[str, Any]:
    """One call. `body` is as it was sent, or its shape."""
    now = time.monotonic() if record.ended is None else record.ended
    body = record.origin.body if prompts or record.ended is not None else shape_of(record.origin.body)
    return {
        "rid": record.key,
        "request_id": record.origin.request_id,
        "route": record.origin.route,
        "received": record.received,
        "seconds": now - record.started,
        "state": state_of(record),
        "status": record.status,
        "error": None if record.error is None else record.error.code,
        "body": body,
        "seed_field": record.origin.names.get("sampling_seed", "sampling_seed"),
        "prompt_tokens": [prompt.num_tokens for prompt in record.prompts],
        "parameters": [msgspec.to_builtins(prompt.used, str_keys=True) for prompt in record.prompts],
        "completions": [completion_dict(one) for one in record.completions],
    }


class Dumper:
    """Writes the calls of the last minutes when something dies, and if wanted each call as it ends."""

    def __init__(self, config: EngineConfig, journal: Journal) -> None:
        """Bodies are kept in the journal from here on if there is a folder. Raises RequestError when it
        can't be written to."""
        observe = config.observe
        self._config = config
        self._journal = journal
        self._allowed = None if observe.crash_dump_folder is None else Path(observe.crash_dump_folder)
        if self._allowed is not None:
            _make(self._allowed)
        self._prompts = observe.crash_dump_prompts
        self.crash_folder = self._allowed
        self.folder: Path | None = None  # of dumps of all calls
        self.threshold = 100  # calls that are written together
        self._pending: list[Record] = []
        self._keep()

    def allows(self, folder: Path) -> bool:
        """Whether a client may name this folder: the one given at the start, or one below it."""
        return self._allowed is not None and folder.resolve().is_relative_to(self._allowed.resolve())

    def set(self, crash_folder: Path | None, folder: Path | None, threshold: int) -> None:
        self.flush()
        self.crash_folder, self.folder, self.threshold = crash_folder, folder, threshold
        self._keep()

    def _keep(self) -> None:
        wanted = self.crash_folder is not None or self.folder is not None
        self._journal.keeps_bodies = (
            (lambda body: body if self._prompts else shape_of(body)) if wanted else None
        )

    # ------------------------------------------------------------------ each call
    def begun(self, record: Record) -> None:
        pass

    def news(self, record: Record, completion: Completion, chunk: Chunk, now: float) -> None:
        pass

    def over(self, record: Record) -> None:
        if self.folder is not None:
            self._pending.append(record)
            if len(self._pending) >= self.threshold:
                self.flush()

    def flush(self) -> None:
        if self.folder is not None and self._pending:
            self._write(self.folder, "requests", "dump_requests_folder", self._pending)
        self._pending = []

    # ------------------------------------------------------------------ crashes
    def crashed(self, reason: str) -> Path | None:
        """Write the calls of the last minutes. Returns the file, or None without a folder."""
        self.flush()
        if self.crash_folder is None:
            return None
        since = time.monotonic() - WINDOW
        ended = [one for one in self._journal.ended() if (one.ended or 0.0) >= since]
        calls = sorted([*ended, *self._journal.live()], key=lambda record: record.received)
        path = self._write(self.crash_folder, "crash", reason, calls)
        if path is not None:
            log.error("the requests of the last %.0f minutes are in %s", WINDOW / 60, path)
        return path

    def _write(self, folder: Path, kind: str, reason: str, calls: Iterable[Record]) -> Path | None:
        """None when it can't be written: that must not end what still works."""
        name = (
            f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{time.monotonic_ns() % 10**6:06d}.jsonl"
        )
        lines = [head_line(self._config, reason, self._prompts)]
        lines += [call_line(record, self._prompts) for record in calls]
        path = folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(b"\n".join(map(msgspec.json.encode, lines)) + b"\n")
        except OSError as error:
            log.error("the dump %s can't be written: %s", path, error.strerror)
            return None
        return path


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RequestError(
            f"--crash-dump-folder {folder} can't be written to: {error.strerror}",
            code="bad_folder",
            param="--crash-dump-folder",
        ) from error
