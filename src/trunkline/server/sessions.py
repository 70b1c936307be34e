"""POST /open_session and /close_session (the sessions themselves are in `engine/sessions.py`)."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from trunkline.engine.native import CLOSE_SESSION_FIELDS, OPEN_SESSION_FIELDS
from trunkline.server.endpoint import Access, Endpoint, Parts
from trunkline.server.http import json_response, read_body
from trunkline.types import RequestError


def endpoints(parts: Parts) -> list[Endpoint]:
    sessions = parts.frontend.sessions

    async def open_session(request: Request) -> Response:
        return json_response(sessions.open(**await read_body(request, OPEN_SESSION_FIELDS)))

    async def close_session(request: Request) -> Response:
        fields = await read_body(request, CLOSE_SESSION_FIELDS)
        if "session_id" not in fields:
            raise RequestError("session_id is missing", code="missing_field", param="session_id")
        sessions.close(fields["session_id"])
        return json_response({})

    return [
        Endpoint(
            "/open_session", ("POST",), open_session, Access.USER, OPEN_SESSION_FIELDS,
            summary="Open a session, whose tokens requests go on from; answers with its id", one_process=True,
        ),
        Endpoint(
            "/close_session", ("POST",), close_session, Access.USER, CLOSE_SESSION_FIELDS,
            summary="Close a session and forget its tokens", one_process=True,
        ),
    ]  # fmt: skip
