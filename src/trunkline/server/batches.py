"""/v1/batches: requests in a file, answered in a file, when there is room."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from trunkline.engine.fields import Number, OneOf, Rule, Text, Unsupported
from trunkline.server.batch_runner import ENDPOINTS, BatchRunner
from trunkline.server.endpoint import Access, Endpoint, Parts
from trunkline.server.files import need, no_file, page
from trunkline.server.http import json_response, read_body, read_query
from trunkline.server.responses_input import Metadata
from trunkline.server.storage import LIVE, Json, Storage, new_batch_id
from trunkline.types import RequestError

MAX_LIVE = 100  # batches that have not ended
_UNITS: Mapping[str, int] = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MAX_WINDOW = 30 * 86400


@dataclass(frozen=True)
class Window(Rule):
    """A time such as 24h, 90m or 7d, in seconds."""

    def read(self, value: Any, name: str) -> int:
        text = Text(16).read(value, name)
        match = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
        seconds = int(match[1]) * _UNITS[match[2]] if match else 0
        if not 1 <= seconds <= MAX_WINDOW:
            raise RequestError(
                f"{name} must be a time of 1s to 30d, such as 24h, not {text!r}",
                code="invalid_value",
                param=name,
            )
        return seconds


BATCH_FIELDS: Mapping[str, Rule] = {
    "input_file_id": Text(shortest=1),
    "endpoint": OneOf(ENDPOINTS),
    "completion_window": Window(),
    "metadata": Metadata(),
    "output_expires_after": Unsupported((), "delete the files when you have read them"),
}
_LIST: Mapping[str, Rule] = {"limit": Number(1, 100), "after": Text()}


def endpoints(parts: Parts) -> list[Endpoint]:
    own = _Batches(parts)
    path, user = "/v1/batches", Access.USER
    return [
        Endpoint(path, ("POST",), own.create, user, BATCH_FIELDS, summary="Answer the requests in a file"),
        Endpoint(path, ("GET",), own.list, user, query=_LIST, summary="The batches"),
        Endpoint(path + "/{id}", ("GET",), own.get, user, summary="How far a batch is"),
        Endpoint(path + "/{id}/cancel", ("POST",), own.cancel, user, summary="End a batch early"),
    ]


class _Batches:
    def __init__(self, parts: Parts) -> None:
        self._shared = parts.storage
        self._owner = parts.model.name
        self._runner = None if parts.storage is None else BatchRunner(parts.storage, parts)
        if self._runner is not None:
            parts.jobs.append(self._runner.run)

    @property
    def _storage(self) -> Storage:
        return need(self._shared)

    async def create(self, request: Request) -> Response:
        storage = self._storage
        body = await read_body(request, {**BATCH_FIELDS, "completion_window": _Kept()})
        for name in ("input_file_id", "endpoint", "completion_window"):
            if name not in body:
                raise RequestError(f"{name} is missing", code="missing_field", param=name)
        window, seconds = body["completion_window"]
        file = await storage.run(storage.file, body["input_file_id"])
        if file is None:
            raise no_file(body["input_file_id"], "input_file_id")
        if file["purpose"] != "batch":
            raise RequestError(
                f"the file has the purpose {file['purpose']}; upload it with batch",
                code="invalid_value",
                param="input_file_id",
            )
        batch = _blank(body, window, seconds, self._owner)
        await storage.run(storage.add_batch, batch, self._owner, MAX_LIVE)
        assert self._runner is not None
        self._runner.wake()
        return json_response(batch)

    async def list(self, request: Request) -> Response:
        query, storage = read_query(_LIST, request), self._storage
        limit = int(query.get("limit", 20))
        return json_response(page(await storage.run(storage.batches, query.get("after"), limit + 1), limit))

    async def get(self, request: Request) -> Response:
        storage = self._storage
        batch = await storage.run(storage.batch, request.path_params["id"])
        return json_response(_known(batch, request))

    async def cancel(self, request: Request) -> Response:
        storage, key = self._storage, request.path_params["id"]
        batch = _known(await storage.run(storage.batch, key), request)
        if batch["status"] in ("validating", "in_progress"):
            batch = _known(await storage.run(storage.cancel_batch, key), request)
        if batch["status"] not in ("cancelling", "cancelled"):
            ended = "is being written down" if batch["status"] in LIVE else f"is {batch['status']}"
            raise RequestError(
                f"the batch {ended}: nothing is left to cancel", code="not_cancellable", status=409
            )
        assert self._runner is not None
        self._runner.wake()
        return json_response(batch)


@dataclass(frozen=True)
class _Kept(Rule):
    """A window as it was written, and in seconds."""

    def read(self, value: Any, name: str) -> tuple[str, int]:
        return value, Window().read(value, name)


def _known(batch: Json | None, request: Request) -> Json:
    if batch is None:
        raise RequestError(
            f"there is no batch {request.path_params['id'][:100]!r}",
            code="batch_not_found",
            param="batch_id",
            status=404,
        )
    return batch


def _blank(body: Json, window: str, seconds: int, model: str) -> Json:
    now = int(time.time())
    times = ("in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at")
    return {
        "id": new_batch_id(),
        "object": "batch",
        "endpoint": body["endpoint"],
        "model": model,
        "errors": None,
        "input_file_id": body["input_file_id"],
        "completion_window": window,
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now,
        "expires_at": now + seconds,
        **dict.fromkeys((*times, "cancelled_at")),
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": body.get("metadata"),
    }
