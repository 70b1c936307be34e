"""POST /start_profile and /stop_profile: where the engine's steps spend their time, as a Chrome trace."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from trunkline.engine.profiling import PROFILE_FIELDS, start_profile, stop_profile
from trunkline.server.endpoint import Access, Endpoint, Parts
from trunkline.server.http import json_response, read_body


def endpoints(parts: Parts) -> list[Endpoint]:
    own = _Profile(parts)
    return [
        Endpoint(
            "/start_profile", ("POST",), own.start, Access.ADMIN, PROFILE_FIELDS,
            summary="Profile the engine's steps, all until /stop_profile or `num_steps` of them",
        ),
        Endpoint("/stop_profile", ("POST",), own.stop, Access.ADMIN, {},
            summary="End the profile and write it",
        ),
    ]  # fmt: skip


class _Profile:
    def __init__(self, parts: Parts) -> None:
        self._frontend = parts.frontend

    async def start(self, request: Request) -> Response:
        fields = await read_body(request, PROFILE_FIELDS)
        path = await start_profile(self._frontend.client, self._frontend.config.observe, fields)
        return json_response({"message": "profiling", "path": path})

    async def stop(self, request: Request) -> Response:
        if request.headers.get("content-length", "0") != "0":
            await read_body(request, {})
        return json_response({"message": "written", "path": await stop_profile(self._frontend.client)})
