"""Routes that steer the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from trunkline.engine.fields import Number, Rule
from trunkline.server.endpoint import Access, Endpoint, Parts
from trunkline.server.fields import ABORT_FIELDS, PAUSE_FIELDS
from trunkline.server.http import json_response, read_body, read_query
from trunkline.types import RequestError

FLUSH_WAIT = 600.0  # most seconds that /flush_cache waits for idleness
FLUSH_QUERY: Mapping[str, Rule] = {"timeout": Number(0, FLUSH_WAIT)}


def endpoints(parts: Parts) -> list[Endpoint]:
    own = _Control(parts)
    return [
        Endpoint(
            "/flush_cache", ("GET", "POST"), own.flush_cache, Access.ADMIN, query=FLUSH_QUERY,
            summary="Empty the prefix cache; `timeout`: seconds to wait for the engine to be idle",
        ),
        Endpoint(
            "/abort_request", ("POST",), own.abort_request, Access.ADMIN, ABORT_FIELDS,
            summary="End one request, or all",
        ),
        Endpoint(
            "/pause_generation", ("POST",), own.pause, Access.ADMIN, PAUSE_FIELDS,
            summary="Run no step until /continue_generation; `mode`: what becomes of running requests",
        ),
        Endpoint(
            "/continue_generation", ("POST",), own.resume, Access.ADMIN, {}, summary="Go on after a pause"
        ),
    ]  # fmt: skip


class _Control:
    def __init__(self, parts: Parts) -> None:
        self._frontend = parts.frontend

    async def flush_cache(self, request: Request) -> Response:
        query = read_query(FLUSH_QUERY, request)
        deadline = time.monotonic() + query.get("timeout", 0.0)
        done = await self._frontend.client.flush_cache()
        while not done.ok and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
            done = await self._frontend.client.flush_cache()
        if not done.ok:
            raise RequestError(f"the cache was not flushed: {done.message}", code="engine_busy")
        return PlainTextResponse(f"cache flushed: {done.message}\n")

    async def abort_request(self, request: Request) -> Response:
        fields = await read_body(request, ABORT_FIELDS)
        if fields.get("abort_all"):
            await self._frontend.client.abort_all()
        elif "rid" in fields:
            await self._frontend.abort(fields["rid"])
        else:
            raise RequestError("give rid, or abort_all: true", code="missing_field", param="rid")
        return json_response({})

    async def pause(self, request: Request) -> Response:
        fields = await _optional_body(request, PAUSE_FIELDS)
        done = await self._frontend.client.pause(fields.get("mode", "abort"))
        return json_response({"status": "ok", "message": f"paused: {done.message}"})

    async def resume(self, request: Request) -> Response:
        await _optional_body(request, {})
        done = await self._frontend.client.resume()
        return json_response({"status": "ok", "message": f"generating again: {done.message}"})


async def _optional_body(request: Request, table: Mapping[str, Rule]) -> dict[str, Any]:
    """No body is an empty object."""
    return {} if request.headers.get("content-length") == "0" else await read_body(request, table)
