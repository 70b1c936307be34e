"""The HTTP client that programs and benchmarks share."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from tests.pure.lang.fake_server import FakeServer
from trunkline.http import TRIES, EndpointError, HttpClient, _seconds


@asynccontextmanager
async def client(server: FakeServer, **fields: str) -> AsyncIterator[HttpClient]:
    http = HttpClient(server.url + "/base/", fields)
    try:
        yield http
    finally:
        http.close()
        await asyncio.sleep(0)


async def test_connections_are_reused_and_replaced() -> None:
    server = FakeServer(lambda path, body: (200, {"path": path, "body": body}))
    with server.running():
        async with client(server, X_Key="k") as http:
            for i in range(3):
                assert await http.json("POST", "/a", i) == {"path": "/base/a", "body": i}
            assert server.connections == 1 and server.requests[0][2]["x_key"] == "k"
            await asyncio.gather(*(http.json("POST", "/b", i) for i in range(8)))
            assert server.connections <= 8
            server.hang_up = True
            for _ in range(3):  # the server closes each connection behind our back
                assert (await http.json("GET", "/c"))["path"] == "/base/c"
                await asyncio.sleep(0.01)


async def test_a_call_that_nobody_waits_for_is_not_collected() -> None:
    asked, answer = threading.Event(), threading.Event()

    def slow(path: str, body: Any) -> Any:
        asked.set()
        answer.wait(30)
        return 200, {"late": True}

    server, found = FakeServer(slow), []
    with server.running():
        async with client(server) as http:

            async def call() -> None:
                found.append(await http.json("GET", "/a"))

            asyncio.get_running_loop().call_soon(asyncio.ensure_future, call())
            while not asked.is_set():
                await asyncio.sleep(0.01)
            gc.collect()
            answer.set()
            async with asyncio.timeout(30):
                while not found:
                    await asyncio.sleep(0.01)
    assert found == [{"late": True}]


async def test_events() -> None:
    events = [{"type": "a", "text": "é" * 5000}, {"type": "b"}]
    server = FakeServer(lambda path, body: list(events))
    with server.running():
        async with client(server) as http:
            for _ in range(2):
                assert [event async for event in http.events("/s", {})] == events
            assert server.connections == 1
            async with aclosing(http.events("/s", {})) as stream:
                assert await anext(stream) == events[0]  # left early: that connection is not used again
            assert [event async for event in http.events("/s", {})] == events
            assert server.connections == 2


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ((400, {"error": {"message": "no", "code": "c", "param": "p"}}), ("no", "c", "p", 400)),
        ((404, {"error": "plain"}), ('{"error": "plain"}', "http_404", None, 404)),
        ((500, {"object": "error", "message": "m", "code": 3}), ("m", "3", None, 500)),
        ((503, b"busy"), ("busy", "http_503", None, 503)),
        ((502, b""), ("HTTP 502", "http_502", None, 502)),
        ([{"error": {"message": "late", "code": "x"}}], ("late", "x", None, 200)),
    ],
)
async def test_errors(reply: Any, expected: tuple[Any, ...]) -> None:
    server = FakeServer(lambda path, body: reply)
    with server.running():
        async with client(server) as http:
            with pytest.raises(EndpointError) as caught:
                if isinstance(reply, list):
                    _ = [event async for event in http.events("/x", {})]
                else:
                    await http.json("POST", "/x", {})
        error = caught.value
        assert (error.message, error.code, error.param, error.status) == expected


async def test_a_broken_stream_and_no_server() -> None:
    server = FakeServer(lambda path, body: [{"type": "a"}, None])
    with server.running():
        async with client(server) as http:
            with pytest.raises(EndpointError, match="broke off"):
                _ = [event async for event in http.events("/x", {})]
    with pytest.raises(OSError):
        await HttpClient(server.url).json("GET", "/")
    with pytest.raises(ValueError, match="is no address"):
        HttpClient("localhost:30000")


async def test_a_busy_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    replies: list[Any] = [(429, {"message": "busy"})] * 3 + [(200, {"ok": True})]
    server = FakeServer(lambda path, body: replies.pop(0) if replies else (429, {"message": "busy"}))
    with server.running():
        async with client(server) as http:
            monkeypatch.setattr("trunkline.http.asyncio.sleep", sleep)
            assert await http.json("POST", "/x", {}) == {"ok": True}
            assert waits == [0.25, 0.5, 1.0]
            with pytest.raises(EndpointError, match="busy"):
                await http.json("POST", "/x", {})
            assert len(server.requests) == 4 + TRIES and server.connections == 1
            monkeypatch.undo()


def test_how_long_to_wait() -> None:
    cases = [("2", 2.0), (None, 0.5), ("900", 30.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 0.5)]
    assert [_seconds(header, 0.5) for header, _ in cases] == [seconds for _, seconds in cases]
