"""The outermost layer of the server: finds the route, asks for the key, bounds what is in progress, turns
errors into answers, and writes one line to the access log."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable
from urllib.parse import quote, urlsplit

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trunkline.server.endpoint import Access, Endpoint, Found, Parts, RouteTable
from trunkline.server.http import error_body, error_response, internal_error
from trunkline.types import RequestError

CLIENT_GONE = 499  # status in the log of a request whose client left
PREFLIGHT_TIME = 600  # seconds that a browser may remember what it is allowed

_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")

log = logging.getLogger(__name__)
access_log = logging.getLogger("trunkline.access")


class Keys:
    """Who may use what. Without keys, everybody may use everything."""

    def __init__(self, api_key: str | None, admin_key: str | None) -> None:
        self._user = None if api_key is None else _digest(api_key.encode())
        self._admin = None if admin_key is None else _digest(admin_key.encode())

    def check(self, access: Access, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raises RequestError: 401 without a valid key, 403 with one that does not reach so far."""
        wanted = self._wanted(access)
        if not wanted:
            return
        given = _keys_in(headers)
        # Digests are compared, and all of them: the time tells neither length nor which one it was.
        matches = {key: [hmac.compare_digest(key, one) for one in given] for key in self._all}
        if any(any(matches[key]) for key in wanted):
            return
        if any(map(any, matches.values())):
            raise RequestError("this route needs the admin key", code="admin_key_needed", status=403)
        raise RequestError(
            "a valid API key is needed: send the header Authorization: Bearer KEY, or x-api-key: KEY",
            code="invalid_api_key",
            status=401,
        )

    @property
    def _all(self) -> tuple[bytes, ...]:
        return tuple(key for key in (self._user, self._admin) if key is not None)

    def _wanted(self, access: Access) -> tuple[bytes, ...]:
        """The keys that open a route; none: it is open."""
        match access:
            case Access.OPEN:
                return ()
            case Access.USER:
                return () if self._user is None else self._all  # an admin is a user, too
            case Access.ADMIN:
                return self._all if self._admin is None else (self._admin,)


def _digest(key: bytes) -> bytes:
    return hashlib.blake2b(key).digest()


def _keys_in(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    found = []
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            if scheme.lower() == b"bearer":
                found.append(_digest(key.strip()))
        elif name == b"x-api-key":
            found.append(_digest(value.strip()))
    return found[:4]


def _dropped(scope: Scope) -> list[tuple[bytes, bytes]]:
    """A header that names the fields which were left out of a body (--allow-unknown-fields)."""
    names = scope.get("dropped_fields")
    if not names:
        return []
    log.warning(
        "request %s: unknown fields are ignored: %s", scope["request_id"], ", ".join(map(repr, names[:20]))
    )
    return [(b"x-ignored-fields", quote(", ".join(names[:20]), safe=", .[]").encode()[:2000])]


def _request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The client's own, if it can stand in a log as it is, else a new one."""
    for name, value in headers:
        if name == b"x-request-id" and _SANE_ID.fullmatch(value):
            return value.decode()
    return uuid.uuid4().hex


class Gate:
    """The ASGI application. Keys come first, for unknown routes too."""

    def __init__(
        self,
        endpoints: Iterable[Endpoint],
        parts: Parts,
    ) -> None:
        """`parts.jobs` run beside the requests; whoever serves the application starts and ends them."""
        self.table = RouteTable(endpoints)
        self.jobs = tuple(parts.jobs)
        self._config = config = parts.frontend.config.server
        self._keys = Keys(config.api_key, config.admin_api_key)
        self._metrics = parts.metrics
        self.frontend = parts.frontend
        self.dumper = parts.dumper
        self.startup = parts.startup
        self._lenient = parts.frontend.config.observe.allow_unknown_fields
        self._active = 0  # requests in progress, but those to open routes

    def with_cors(self) -> ASGIApp:
        """The application as browsers may use it from pages of the allowed origins."""
        if not self._config.cors_allow_origins:
            return self
        return CORSMiddleware(
            self,
            allow_origins=self._config.cors_allow_origins,
            allow_methods=("GET", "POST", "PUT", "DELETE"),
            allow_headers=("*",),
            expose_headers=("x-request-id",),
            max_age=PREFLIGHT_TIME,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # nothing else is served; the server closes it
        started, status = time.monotonic(), 0
        request_id = scope["request_id"] = _request_id(scope["headers"])
        scope["max_body"] = self._config.max_body
        method, path = scope["method"], self._path(scope)
        found = self.table.find(method, path)

        if self._lenient and found.endpoint is not None:
            scope["lenient_fields"] = found.endpoint.fields

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(b"x-request-id", request_id.encode()), *_dropped(scope)]
                message["headers"] = [*message.get("headers", ()), *extra]
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
            fields = {"client": client[0], "method": method, "path": path, "status": status}
            access_log.info(
                "%s %r %d %.1fms %s", client[0], f"{method} {path}", status, millis, request_id,
                extra={"fields": {**fields, "millis": round(millis, 3), "request_id": request_id}},
            )  # fmt: skip

    def _path(self, scope: Scope) -> str:
        path, prefix = str(scope["path"]), self._config.root_path
        return path[len(prefix) :] if prefix and path.startswith(prefix + "/") else path

    async def _answer(
        self, found: Found, scope: Scope, receive: Receive, send: Send, begun: Callable[[], bool]
    ) -> None:
        counted = found.endpoint is None or found.endpoint.access is not Access.OPEN
        self._active += counted
        try:
            self._keys.check(
                Access.USER if found.endpoint is None else found.endpoint.access, scope["headers"]
            )
            self._check_origin(scope)
            if counted and self._active > self._config.max_concurrent:
                raise RequestError(
                    f"{self._active - 1} requests are in progress, the limit is "
                    f"{self._config.max_concurrent}: retry later (--max-concurrent-requests raises it)",
                    code="too_many_requests",
                    status=429,
                )
            if found.endpoint is None or not found.allowed:
                raise self._no_route(found, scope)
            if found.endpoint.one_process:
                self.frontend.need_one_process(found.endpoint.path)
            scope["path_params"] = found.params
            answer = await found.endpoint.handler(Request(scope, receive, send))
            await answer(scope, receive, send)
        except ClientDisconnect:
            raise
        except Exception as error:
            refusal = error if isinstance(error, RequestError) else internal_error(error, scope["request_id"])
            if not begun():
                envelope = error_body if found.endpoint is None else found.endpoint.envelope
                await error_response(refusal, envelope)(scope, receive, send)
        finally:
            self._active -= counted

    def _check_origin(self, scope: Scope) -> None:
        """Keep pages of other sites from using a server that their reader can reach: without CORS a browser
        hides answers from them, but it sends what they post."""
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return
        headers = dict(scope["headers"])
        origin = headers.get(b"origin", b"").decode("latin-1")
        allowed = self._config.cors_allow_origins
        if not origin or "*" in allowed or origin in allowed:
            return
        if urlsplit(origin).netloc != headers.get(b"host", b"").decode("latin-1"):
            raise RequestError(
                f"pages of {origin[:200]} may not use this server (--cors-allow-origin allows it)",
                code="origin_not_allowed",
                status=403,
            )

    def _no_route(self, found: Found, scope: Scope) -> RequestError:
        asked = f"{scope['method']} {scope['path'][:200]}"
        if found.endpoint is None:
            return RequestError(f"there is no such route: {asked}", code="not_found", status=404)
        others = ", ".join(self.table.methods(found.endpoint.path))
        return RequestError(
            f"the route has other methods ({others}): {asked}", code="method_not_allowed", status=405
        )
