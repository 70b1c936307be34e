"""Bounds on what waits and on what nobody reads, and what clients are told (P11)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

import httpx
import msgspec
import pytest

from tests.server.conftest import http_client, make_app
from tests.server.fake_client import FakeClient
from tests.server.test_engine_client import ask, config_of
from tests.server.test_http import CHAT, HI, running, until
from trunkline.config.schema import EngineConfig, SchedulerConfig
from trunkline.engine import client as client_module
from trunkline.engine.client import EngineClient
from trunkline.engine.drain import DrainRate
from trunkline.engine.frontend import Frontend
from trunkline.engine.unread import Unread
from trunkline.messages import TokensOut
from trunkline.server import http as http_module
from trunkline.text.tokenizer import Tokenizer
from trunkline.types import FinishReason, RequestError, TokenLogprobs


# ---------------------------------------------------------------------- when to come back
def test_the_drain_rate() -> None:
    times = [0.0]
    rate = DrainRate(lambda: times[0])
    assert rate.seconds(100) == 1  # nothing is known
    for _ in range(10):
        times[0] += 1
        rate.ended()
    times[0] += 1
    assert rate.seconds(1) == 1 and rate.seconds(5) == 5 and rate.seconds(7) == 7
    assert rate.seconds(10**6) == 60
    times[0] = 100.0
    assert rate.seconds(100) == 1  # long ago


async def test_the_refused_are_told_when_to_come_back(
    http: httpx.AsyncClient, client: FakeClient, frontend: Frontend
) -> None:
    client.refusal = FinishReason("abort", message="the queue is full", code="queue_full", status=429)
    response = await http.post(CHAT, json=HI)
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    for _ in range(3):
        frontend._drain.ended()
        await asyncio.sleep(0.2)
    assert frontend.retry_after(100) > 10


async def test_nothing_of_a_refused_request_is_kept_by_its_error(
    client: FakeClient, tokenizer: Tokenizer, config: EngineConfig
) -> None:
    app = make_app(client, tokenizer, config)
    client.refusal = FinishReason("abort", message="the queue is full", code="queue_full", status=429)
    async with http_client(app) as http:
        assert (await http.post(CHAT, json=HI)).status_code == 429
    (record,) = app.frontend.journal.ended()
    error = record.error
    assert error is not None and error.code == "queue_full"
    held = (error.__traceback__, error.__cause__, error.__context__)
    assert held == (None, None, None)  # their frames hold the whole request


# ---------------------------------------------------------------------- priorities
@pytest.mark.parametrize("route", ["/v1/completions", "/generate"])
async def test_default_and_refused_priorities(
    client: FakeClient, tokenizer: Tokenizer, config: EngineConfig, route: str
) -> None:
    body = {"prompt": "a"} if route == "/v1/completions" else {"text": "a"}
    for scheduler, status, priority in (
        (SchedulerConfig(), 200, 7),
        (SchedulerConfig(default_priority=3), 200, 7),
        (SchedulerConfig(refuse_priority=True, default_priority=3), 400, None),
    ):
        app = make_app(client, tokenizer, msgspec.structs.replace(config, scheduler=scheduler))
        async with http_client(app) as http:
            response = await http.post(route, json={**body, "priority": 7})
            assert response.status_code == status
            if priority is not None:
                assert client.added[-1].priority == priority
            else:
                assert response.json()["error"]["param"] == "priority"
                assert "--abort-on-priority-when-disabled" in response.text
            assert (await http.post(route, json=body)).status_code == 200
            assert client.added[-1].priority == scheduler.default_priority


# ---------------------------------------------------------------------- pause
async def test_pause_and_continue(http: httpx.AsyncClient, client: FakeClient) -> None:
    for body in ({}, {"mode": "retract"}, {"mode": "in_place"}, None):
        response = await http.post("/pause_generation", json=body)
        assert response.status_code == 200 and client.paused
        assert response.json()["message"].startswith(f"paused: {(body or {}).get('mode', 'abort')}")
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/health_generate")).json()["error"]["code"] == "paused"
        assert (await http.post("/continue_generation")).status_code == 200 and not client.paused
    for bad in ({"mode": "sideways"}, {"mod": "abort"}):
        response = await http.post("/pause_generation", json=bad)
        assert response.status_code == 400 and not client.paused


async def test_a_pause_in_a_real_core_changes_no_token(tiny_model: Path) -> None:
    client = await EngineClient.in_process(config_of(tiny_model))

    async def tokens(rid: str) -> list[int]:
        return [token for out in [o async for o in client.stream(ask(rid, 300))] for token in out.token_ids]

    try:
        alone = await tokens("alone")
        for mode in ("in_place", "retract"):
            task = asyncio.create_task(tokens(mode))
            await asyncio.sleep(0.05)
            done = await client.pause(mode)  # type: ignore[arg-type]
            assert done.ok and client.paused and not task.done()
            steps = (await client.stats()).counters["steps"]
            late = asyncio.create_task(tokens("late"))
            await asyncio.sleep(0.1)
            stats = await client.stats()
            assert stats.counters["steps"] == steps
            assert stats.gauges["running"] == (mode == "in_place")
            assert (await client.flush_cache()).ok == (mode == "retract")
            await client.resume()
            assert await task == await late == alone
        task = asyncio.create_task(tokens("gone"))
        await asyncio.sleep(0.05)
        await client.pause("abort")
        assert len(await task) < 300
        assert (await client.stats()).gauges["pages_in_use"] == 0
        await client.resume()
        assert await tokens("again") == alone
    finally:
        await client.close()


# ---------------------------------------------------------------------- who does not read
async def test_unread_output_is_counted() -> None:
    unread = Unread()
    plain = TokensOut(rid="a", token_ids=[1] * 60_000)
    assert unread.put(plain)
    assert await unread.get() is plain
    assert unread.put(plain)
    rich = TokensOut(rid="a", token_ids=[1] * 300, logprobs=[TokenLogprobs(1, -1.0, [(1, -1.0)] * 20)] * 300)
    assert not unread.put(rich)
    unread.fail(RequestError("no", code="slow_reader"))
    assert isinstance(await unread.get(), RequestError)
    waiting = asyncio.create_task(unread.get())
    await asyncio.sleep(0)
    unread.put(plain)
    assert await waiting is plain


async def test_what_nobody_takes_is_aborted(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(client_module, "MAX_UNREAD", 50)
    monkeypatch.setattr("trunkline.engine.unread.MAX_UNREAD", 50)
    client = await EngineClient.in_process(config_of(tiny_model))
    try:
        stream = client.stream(ask("lazy", 400))
        await anext(stream)
        with caplog.at_level(logging.WARNING):
            while (await client.stats()).gauges["running"]:
                await asyncio.sleep(0.01)
        assert "lazy" in caplog.text and "unread" in caplog.text
        with pytest.raises(RequestError) as caught:
            async for _ in stream:
                pass
        assert caught.value.code == "slow_reader"
        stats = await client.stats()
        assert stats.gauges["pages_in_use"] == 0 and stats.counters["aborted"] == 1
        assert stats.counters["generated_tokens"] < 200
    finally:
        await client.close()


async def test_a_client_that_stops_reading_is_left(
    client: FakeClient, tokenizer: Tokenizer, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_module, "READ_TIME", 0.2)
    client.max_context = 200_000
    client.script = lambda request: [70] * 100_000
    app = make_app(client, tokenizer, config)
    async with running(app) as url:
        port = int(url.rsplit(":", 1)[1])
        _reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        body = msgspec.json.encode({"prompt": "a", "max_tokens": 100_000, "ignore_eos": True, "stream": True})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await until(lambda: len(client.live) == 1)
        await until(lambda: not client.live, 10)
        assert len(client.left_early) == 1
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
