"""What every route shares: bodies in, errors out, disconnects, the API key, the access log."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Router
from starlette.types import Message, Receive, Scope, Send

from trunkline.engine.frontend import RETRY_AFTER
from trunkline.grammar.protocol import GrammarError
from trunkline.metrics.prometheus import Metrics
from trunkline.types import RequestError

MAX_BODY = 32 * 2**20  # bytes
BODY_TIME = 60.0  # seconds in which a body must have come
CLIENT_GONE = 499  # status in the log of a request whose client left

log = logging.getLogger(__name__)
access_log = logging.getLogger("trunkline.access")


# ---------------------------------------------------------------------- bodies
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
    return body


def _bad_json(what: str) -> RequestError:
    return RequestError(f"the body is not valid JSON: {what}", code="invalid_json")


async def _read_body(request: Request) -> bytes:
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_TIME):
            async for part in request.stream():
                size += len(part)
                if size > MAX_BODY:
                    raise RequestError(
                        f"the body is larger than {MAX_BODY} bytes", code="body_too_large", status=413
                    )
                parts.append(part)
    except TimeoutError:
        raise RequestError(
            f"the body did not arrive within {BODY_TIME:g} s", code="body_timeout", status=408
        ) from None
    return b"".join(parts)


# ---------------------------------------------------------------------- answers
def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def error_body(error: RequestError) -> dict[str, Any]:
    """OpenAI's envelope; the native routes use it too."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = "server_error" if error.status >= 500 else kinds.get(error.status, "invalid_request_error")
    body = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    if isinstance(error, GrammarError):
        body["pointer"] = error.pointer
    return {"error": body}


def error_response(error: RequestError) -> Response:
    headers = {}
    if error.status in (429, 503):
        headers["retry-after"] = str(RETRY_AFTER)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status == 413:
        headers["connection"] = "close"  # the rest of the body is not read
    return json_response(error_body(error), error.status, headers)


def internal_error(error: Exception, request_id: str) -> RequestError:
    """What a client is told about a fault of ours: nothing but where to find it in the log."""
    log.error("request %s failed", request_id, exc_info=error)
    return RequestError(
        f"internal error; the server's log has the details under request id {request_id}",
        code="internal_error",
        status=500,
    )


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`; cancel it when the client leaves, and raise ClientDisconnect. The body must be read."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
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


# ---------------------------------------------------------------------- the outermost layer
class Gate:
    """Wraps the routes: API key first (for unknown routes too), errors as JSON, one log line each."""

    def __init__(
        self, router: Router, open_paths: frozenset[str], api_key: str | None, metrics: Metrics
    ) -> None:
        self._router = router
        self._open_paths = open_paths
        self._key = None if api_key is None else api_key.encode()
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # nothing else is served; the server closes it
        started, status = time.monotonic(), 0
        request_id = scope["request_id"] = uuid.uuid4().hex
        scope["app"] = self  # so that the router raises for unknown routes and methods

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        self._metrics.http_started()
        try:
            await self._answer(scope, receive, send_noting, lambda: status != 0)
        except ClientDisconnect:
            status = CLIENT_GONE
        finally:
            route, method = self._route_name(scope), scope["method"]
            self._metrics.http_ended(method if route != "unknown" else "any", route, status)
            client = scope.get("client") or ("-", 0)
            millis = (time.monotonic() - started) * 1000
            access_log.info(
                "%s %r %d %.1fms %s", client[0], f"{method} {scope['path']}", status, millis, request_id
            )

    async def _answer(self, scope: Scope, receive: Receive, send: Send, begun: Callable[[], bool]) -> None:
        try:
            self._authorize(scope)
            await self._router(scope, receive, send)
        except ClientDisconnect:
            raise
        except Exception as error:
            refusal = _as_refusal(error, scope)
            if not begun():
                await error_response(refusal)(scope, receive, send)

    def _authorize(self, scope: Scope) -> None:
        if self._key is None or scope["path"] in self._open_paths:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        right = hmac.compare_digest(key.strip(), self._key)
        if not (right and scheme.lower() == b"bearer"):
            raise RequestError(
                "a valid API key is needed: send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                status=401,
            )

    def _route_name(self, scope: Scope) -> str:
        for route in self._router.routes:
            if route.matches(scope)[0] is not Match.NONE:
                return str(getattr(route, "path", "unknown"))
        return "unknown"


def _as_refusal(error: Exception, scope: Scope) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, HTTPException):
        what = {
            404: ("there is no such route", "not_found"),
            405: ("the route has other methods", "method_not_allowed"),
        }
        message, code = what.get(error.status_code, ("the request was refused", "refused"))
        return RequestError(
            f"{message}: {scope['method']} {scope['path'][:200]}", code=code, status=error.status_code
        )
    return internal_error(error, scope["request_id"])
