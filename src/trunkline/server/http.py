"""What every route shares: bodies and queries in, answers and errors out, disconnects."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Send

from trunkline.engine.fields import Rule, drop_unknown, read_fields
from trunkline.grammar.protocol import GrammarError
from trunkline.types import RequestError

RETRY_AFTER = 1  # seconds, where nothing better is known
READ_TIME = 120.0  # seconds for which a client may read nothing of its answer
BODY_TIME = 60.0  # seconds in which a body must have come

log = logging.getLogger(__name__)


# ---------------------------------------------------------------------- what comes in
async def read_json(request: Request) -> dict[str, Any]:
    """The body, which must be a JSON object. Raises RequestError saying where it is not."""
    data = await _read_body(request)
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise _bad_json(f"invalid UTF-8 at byte {error.start}") from None
    try:
        body = msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        where = re.search(r"\(byte (\d+)\)", str(error))
        at = f"at byte {where[1]}" if where else "it ends early, or a number is out of range"
        raise _bad_json(at) from None
    except UnicodeDecodeError:
        raise _bad_json("an escaped character is not valid") from None
    except (RecursionError, ValueError):
        raise _bad_json("it nests too deeply, or a number has too many digits") from None
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object", code="invalid_type")
    lenient = request.scope.get("lenient_fields")
    if lenient is None:
        return body
    known, request.scope["dropped_fields"] = drop_unknown(lenient, body)
    return known


async def read_body(request: Request, table: Mapping[str, Rule]) -> dict[str, Any]:
    """The body's fields, checked against the table of its route. Raises RequestError."""
    return read_fields(table, await read_json(request))


def read_query(table: Mapping[str, Rule], request: Request) -> dict[str, Any]:
    """The address's parameters, checked; numbers as such. Raises RequestError."""
    found: dict[str, float | str] = {}
    for name, text in request.query_params.items():
        try:
            found[name] = float(text)
        except ValueError:
            found[name] = text
    return read_fields(table, found)


def _bad_json(what: str) -> RequestError:
    return RequestError(f"the body is not valid JSON: {what}", code="invalid_json")


async def _read_body(request: Request) -> bytes:
    parts, size, limit = [], 0, request.scope["max_body"]
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise _too_large(limit)
    try:
        async with asyncio.timeout(BODY_TIME):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise _too_large(limit)
                parts.append(part)
    except TimeoutError:
        raise RequestError(
            f"the body did not arrive within {BODY_TIME:g} s", code="body_timeout", status=408
        ) from None
    return b"".join(parts)


def _too_large(limit: int) -> RequestError:
    return RequestError(
        f"the body is larger than {limit} bytes (--max-body-size raises it)",
        code="body_too_large",
        status=413,
    )


# ---------------------------------------------------------------------- answers
def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def error_body(error: RequestError) -> dict[str, Any]:
    """OpenAI's envelope; the native routes use it too."""
    kinds = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        429: "rate_limit_error",
    }
    kind = "server_error" if error.status >= 500 else kinds.get(error.status, "invalid_request_error")
    body = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    if isinstance(error, GrammarError):
        body["pointer"] = error.pointer
    return {"error": body}


def error_response(
    error: RequestError, envelope: Callable[[RequestError], dict[str, Any]] = error_body
) -> Response:
    headers = {}
    if error.status in (429, 503):
        headers["retry-after"] = str(error.retry_after or RETRY_AFTER)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status == 413:
        headers["connection"] = "close"  # the rest of the body is not read
    return json_response(envelope(error), error.status, headers)


def internal_error(error: Exception, request_id: str) -> RequestError:
    """What a client is told about a fault of ours: nothing but where to find it in the log."""
    log.error("request %s failed", request_id, exc_info=error)
    return RequestError(
        f"internal error; the server's log has the details under request id {request_id}",
        code="internal_error",
        status=500,
    )


class Sending:
    """Sends, and knows how much has gone out: a client that reads nothing is told by it."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = self.done = 0

    async def __call__(self, message: Message) -> None:
        self.started += 1
        await self._send(message)
        self.done += 1


async def until_disconnect(
    receive: Receive, sending: Sending, work: Coroutine[Any, Any, None], request_id: str
) -> None:
    """Run `work`; cancel it when the client leaves, or reads nothing for READ_TIME, and raise
    ClientDisconnect. The body must be read."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    seen = -1
    try:
        while not (task.done() or watch.done()):
            await asyncio.wait((task, watch), timeout=READ_TIME, return_when=asyncio.FIRST_COMPLETED)
            if sending.started > sending.done == seen:
                log.warning("request %s: its client reads nothing for %g s: aborted", request_id, READ_TIME)
                break
            seen = sending.done
        gone = not task.done()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
    if gone:
        raise ClientDisconnect
    task.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
