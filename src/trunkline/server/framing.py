"""How the events of a streamed answer, and errors, are written in each interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from trunkline.server.call import Json
from trunkline.server.http import error_body
from trunkline.types import RequestError


@dataclass(frozen=True)
class Framing:
    """`frame`: one event on the wire; `end`: what follows the last; `envelope`: an error as a body, or as an
    event."""

    media_type: bytes
    frame: Callable[[Json], bytes]
    envelope: Callable[[RequestError], Json]
    end: bytes = b""


def _event(event: Json) -> bytes:
    return b"data: " + msgspec.json.encode(event) + b"\n\n"


def _named_event(event: Json) -> bytes:
    return b"event: " + str(event["type"]).encode() + b"\n" + _event(event)


def _line(event: Json) -> bytes:
    return msgspec.json.encode(event) + b"\n"


def _anthropic_error(error: RequestError) -> Json:
    kinds = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        503: "overloaded_error",
    }
    kind = kinds.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    inner = {**error_body(error)["error"], "type": kind}
    return {"type": "error", "error": inner}


def _responses_error(error: RequestError) -> Json:
    body = error_body(error)
    return {"type": "error", **body, **{name: body["error"][name] for name in ("code", "message", "param")}}


def _ollama_error(error: RequestError) -> Json:
    return {"error": error.message, "code": error.code, "param": error.param}


_SSE = b"text/event-stream; charset=utf-8"
OPENAI = Framing(_SSE, _event, error_body, b"data: [DONE]\n\n")
RESPONSES = Framing(_SSE, _named_event, _responses_error)
ANTHROPIC = Framing(_SSE, _named_event, _anthropic_error)
OLLAMA = Framing(b"application/x-ndjson", _line, _ollama_error)
