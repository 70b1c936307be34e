"""Draws calls with schemathesis and sends them to an application or a server."""

from __future__ import annotations

import asyncio
import itertools
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import hypothesis
import schemathesis

CALLS_ONCE = 40  # examples of one operation in one go, so that all get their turn early
# Would end what the fuzzing itself needs, or wait by design.
LEFT_OUT = ("/flush_cache", "/health_generate")

Send = Callable[..., httpx.Response]


class ServerError(AssertionError):
    """A call was answered with 5xx."""


def fuzz(document: dict[str, Any], send: Send, calls: int, seed: int) -> Counter[int]:
    """At least `calls` calls, spread over all operations; how often each status came.

    Raises ServerError with the first call that got a 5xx.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library, about its own dependencies
        operations = [result.ok() for result in schemathesis.openapi.from_dict(document).get_all_operations()]
    operations = [one for one in operations if one.path not in LEFT_OUT]
    seen: Counter[int] = Counter()
    for number, operation in enumerate(itertools.cycle(operations)):
        if seen.total() >= calls:
            return seen
        _examples(operation, send, seen, hash((seed, number)) & 0xFFFFFFFF)
    return seen


def _examples(operation: Any, send: Send, seen: Counter[int], seed: int) -> None:
    simple = not operation.path_parameters and not operation.query and not operation.body
    count = 1 if simple else CALLS_ONCE

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count, deadline=None, database=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(operation.as_strategy())
    def call(case: Any) -> None:
        kwargs = case.as_transport_kwargs(base_url="http://test")
        wanted = ("method", "url", "headers", "params", "json", "data", "content")
        request = {name: kwargs[name] for name in wanted if kwargs.get(name) is not None}
        response = send(**request)
        seen[response.status_code] += 1
        if response.status_code >= 500:
            raise ServerError(f"{response.status_code} for {request}: {response.text[:500]}")

    call()


def application(app: Any, loop: asyncio.AbstractEventLoop) -> Send:
    """Sends to an ASGI application on `loop`."""
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")

    def send(**request: Any) -> httpx.Response:
        try:
            return loop.run_until_complete(client.request(**request))
        except (httpx.InvalidURL, UnicodeEncodeError, ValueError):  # what no client could send
            return httpx.Response(400)

    return send
