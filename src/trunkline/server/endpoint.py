"""What a route is: its path, who may use it, and which fields its body has.

Modules of routes declare theirs as data, `endpoints(parts)`; `routes.py` puts them together."""

from __future__ import annotations

import enum
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.convertors import Convertor
from starlette.requests import Request
from starlette.routing import compile_path
from starlette.types import ASGIApp

from trunkline.engine.dump import Dumper
from trunkline.engine.fields import Rule
from trunkline.engine.frontend import Frontend
from trunkline.metrics.prometheus import Metrics
from trunkline.server.call import ServedModel
from trunkline.server.http import error_body
from trunkline.server.request_log import RequestLog
from trunkline.server.storage import Storage
from trunkline.types import RequestError

Job = Callable[[], Coroutine[Any, Any, None]]
Handler = Callable[[Request], Awaitable[ASGIApp]]


class Access(enum.Enum):
    """Who may use a route. There is no default: each route says it."""

    OPEN = "open"  # everybody, keys or not: what probes and scrapers need; shows no user data
    USER = "user"  # whoever has the API key, if one is set
    ADMIN = "admin"  # whoever has the admin key, if one is set, else the API key


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What routes are made of. `storage`: of files and batches, None where none are kept. `jobs`: what is to
    run beside the requests until the server ends; modules of routes add theirs."""

    frontend: Frontend
    model: ServedModel
    metrics: Metrics
    request_log: RequestLog
    dumper: Dumper
    startup: dict[str, Any] = field(default_factory=dict)  # what is known when the server has started
    storage: Storage | None = None
    jobs: list[Job] = field(default_factory=list)


@dataclass(frozen=True)
class Endpoint:
    """One route. `path` may hold `{name}` and `{name:path}`. `fields`: of the JSON body, None where there is
    none. `query`: parameters of the address. `envelope`: how its errors are written. `one_process`: what it
    tells or changes lives in one process: it is refused where there are several."""

    path: str
    methods: tuple[str, ...]
    handler: Handler
    access: Access
    fields: Mapping[str, Rule] | None = None
    query: Mapping[str, Rule] | None = None
    summary: str = ""
    envelope: Callable[[RequestError], dict[str, Any]] = error_body
    one_process: bool = False


@dataclass(frozen=True)
class Found:
    """What a method and a path lead to. `endpoint`: None for an unknown path. `allowed`: whether it has the
    method."""

    endpoint: Endpoint | None
    allowed: bool = False
    params: Mapping[str, Any] | None = None


class RouteTable:
    """Finds the endpoint of a request. A GET route answers HEAD as well."""

    def __init__(self, endpoints: Iterable[Endpoint]) -> None:
        """Raises ValueError for two endpoints with the same path and method."""
        self.endpoints = tuple(endpoints)
        self._exact: dict[str, list[Endpoint]] = {}
        self._patterns: list[tuple[re.Pattern[str], dict[str, Convertor[Any]], Endpoint]] = []
        taken: set[tuple[str, str]] = set()
        for endpoint in self.endpoints:
            keys = {(method, endpoint.path) for method in endpoint.methods}
            if keys & taken:
                raise ValueError(f"two routes for {sorted(keys & taken)}")
            taken |= keys
            if "{" in endpoint.path:
                pattern, _, convertors = compile_path(endpoint.path)
                self._patterns.append((pattern, convertors, endpoint))
            else:
                self._exact.setdefault(endpoint.path, []).append(endpoint)

    def find(self, method: str, path: str) -> Found:
        """The endpoint that has this path and method, else one that only has the path."""
        if method == "HEAD":
            method = "GET"
        partial = Found(None)
        for endpoint in self._exact.get(path, ()):
            if method in endpoint.methods:
                return Found(endpoint, True, {})
            partial = Found(endpoint)
        for pattern, convertors, endpoint in self._patterns:
            match = pattern.match(path)
            if match is None:
                continue
            if method in endpoint.methods:
                params = {name: convertors[name].convert(text) for name, text in match.groupdict().items()}
                return Found(endpoint, True, params)
            partial = Found(endpoint) if partial.endpoint is None else partial
        return partial

    def methods(self, path: str) -> list[str]:
        """Of all endpoints with this path, as they declare it."""
        return sorted({method for one in self.endpoints if one.path == path for method in one.methods})
