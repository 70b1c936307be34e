"""The outermost layer of the server: finds the route, asks for the key, turns errors into answers, and writes
one line to the access log."""

from __future__ import annotations

import hmac
import logging
import time
import uuid
from collections.abc import Callable, Iterable

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from trunkline.metrics.prometheus import Metrics
from trunkline.server.endpoint import Access, Endpoint, Found, RouteTable
from trunkline.server.http import error_response, internal_error
from trunkline.types import RequestError

CLIENT_GONE = 499  # status in the log of a request whose client left

access_log = logging.getLogger("trunkline.access")


class Gate:
    """The ASGI application. Keys come first, for unknown routes too."""

    def __init__(self, endpoints: Iterable[Endpoint], api_key: str | None, metrics: Metrics) -> None:
        self.table = RouteTable(endpoints)
        self._key = None if api_key is None else api_key.encode()
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # nothing else is served; the server closes it
        started, status = time.monotonic(), 0
        request_id = scope["request_id"] = uuid.uuid4().hex
        method, path = scope["method"], scope["path"]
        found = self.table.find(method, path)

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        self._metrics.http_started()
        try:
            await self._answer(found, scope, receive, send_noting, lambda: status != 0)
        except ClientDisconnect:
            status = CLIENT_GONE
        finally:
            if found.endpoint is None:
                self._metrics.http_ended("any", "unknown", status)
            else:
                self._metrics.http_ended(method, found.endpoint.path, status)
            client = scope.get("client") or ("-", 0)
            millis = (time.monotonic() - started) * 1000
            access_log.info("%s %r %d %.1fms %s", client[0], f"{method} {path}", status, millis, request_id)

    async def _answer(
        self, found: Found, scope: Scope, receive: Receive, send: Send, begun: Callable[[], bool]
    ) -> None:
        try:
            self._authorize(scope, Access.USER if found.endpoint is None else found.endpoint.access)
            if found.endpoint is None or not found.allowed:
                raise self._no_route(found, scope)
            scope["path_params"] = found.params
            answer = await found.endpoint.handler(Request(scope, receive, send))
            await answer(scope, receive, send)
        except ClientDisconnect:
            raise
        except Exception as error:
            refusal = error if isinstance(error, RequestError) else internal_error(error, scope["request_id"])
            if not begun():
                await error_response(refusal)(scope, receive, send)

    def _authorize(self, scope: Scope, access: Access) -> None:
        if self._key is None or access is Access.OPEN:
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

    def _no_route(self, found: Found, scope: Scope) -> RequestError:
        asked = f"{scope['method']} {scope['path'][:200]}"
        if found.endpoint is None:
            return RequestError(f"there is no such route: {asked}", code="not_found", status=404)
        others = ", ".join(self.table.methods(scope["path"]))
        return RequestError(
            f"the route has other methods ({others}): {asked}", code="method_not_allowed", status=405
        )
