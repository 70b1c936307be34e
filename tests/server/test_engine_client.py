"""The engine client against real cores: one in a thread, others in processes that are killed and stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from trunkline.config.schema import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, ServerConfig
from trunkline.engine.client import EngineClient
from trunkline.messages import AddRequest, TokensOut
from trunkline.types import RequestError, SamplingParams


def config_of(model: Path, watchdog: float = 60.0) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(path=str(model)),
        cache=CacheConfig(page_size=4, num_pages=128),
        scheduler=SchedulerConfig(max_running=4, step_tokens=64, max_context=512, max_queued=4),
        server=ServerConfig(watchdog_timeout=watchdog, log_level="critical"),
    )


def ask(rid: str, new: int = 8) -> AddRequest:
    params = SamplingParams(max_new_tokens=new, temperature=0.0, ignore_eos=True)
    return AddRequest(rid=rid, token_ids=[5, 6, 7, 8, 9], params=params)


async def outputs(client: EngineClient, request: AddRequest) -> list[TokensOut]:
    return [out async for out in client.stream(request)]


async def tokens(client: EngineClient, request: AddRequest) -> list[int]:
    return [token for out in await outputs(client, request) for token in out.token_ids]


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.02)


async def core_pid(client: EngineClient) -> int:
    assert client.ready is not None
    pid = client.ready.info["pid"]
    assert isinstance(pid, int) and pid != os.getpid()
    return pid


@pytest.fixture
async def in_thread(tiny_model: Path) -> AsyncIterator[EngineClient]:
    client = await EngineClient.in_process(config_of(tiny_model))
    yield client
    await client.close()


async def test_streams_abort_and_flush(in_thread: EngineClient) -> None:
    client = in_thread
    alone = await tokens(client, ask("alone"))
    assert len(alone) == 8
    assert await asyncio.gather(*(tokens(client, ask(f"r{i}")) for i in range(6))) == [alone] * 6

    stream = client.stream(ask("left", 400))
    await anext(stream)
    busy = await client.flush_cache()
    assert not busy.ok and "1 requests are running" in busy.message
    await stream.aclose()
    aborted = asyncio.create_task(outputs(client, ask("aborted", 400)))
    await asyncio.sleep(0.05)
    await client.abort("aborted")
    finish = (await aborted)[-1].finish
    assert finish is not None and finish.kind == "abort"

    stats = await client.stats()
    assert stats.gauges["running"] == stats.gauges["waiting"] == stats.gauges["pages_in_use"] == 0
    assert stats.counters["requests"] == 9
    assert (await client.flush_cache()).ok


async def test_refusals_arrive_as_last_output(in_thread: EngineClient) -> None:
    many = [asyncio.create_task(outputs(in_thread, ask(f"r{i}", 300))) for i in range(12)]
    ends = [found[-1].finish for found in await asyncio.gather(*many)]
    codes = [end.code for end in ends if end is not None and end.kind == "abort"]
    assert codes == ["queue_full"] * 4
    with pytest.raises(RequestError, match="still running"):
        await asyncio.gather(tokens(in_thread, ask("same", 50)), tokens(in_thread, ask("same", 50)))


async def test_a_killed_core_ends_its_requests_and_is_restarted(tiny_model: Path) -> None:
    client = await EngineClient.launch(config_of(tiny_model))
    try:
        expected = await tokens(client, ask("before"))
        first = await core_pid(client)
        async with aclosing(client.stream(ask("running", 480))) as running:
            assert (await anext(running)).token_ids
            os.kill(first, signal.SIGKILL)
            killed = time.monotonic()
            with pytest.raises(RequestError, match="killed by SIGKILL") as error:
                async for _ in running:
                    pass
        assert error.value.status == 503 and time.monotonic() - killed < 2
        with pytest.raises(RequestError, match="restarting"):
            await tokens(client, ask("meanwhile"))
        assert not client.health.ok
        await until(lambda: client.health.ok)
        assert await tokens(client, ask("before")) == expected
        assert await core_pid(client) != first
    finally:
        await client.close()


async def test_a_stalled_core_is_unhealthy_then_replaced(tiny_model: Path) -> None:
    client = await EngineClient.launch(config_of(tiny_model, watchdog=2.0))
    try:
        first = await core_pid(client)
        os.kill(first, signal.SIGSTOP)
        await until(lambda: not client.health.ok)
        assert "no progress" in client.health.reason
        await until(lambda: client.health.ok)
        assert await core_pid(client) != first
        assert len(await tokens(client, ask("after"))) == 8
    finally:
        await client.close()


async def test_closing_leaves_no_process_and_no_folder(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    client = await EngineClient.launch(config_of(tiny_model))
    pid = await core_pid(client)
    assert list(tmp_path.iterdir()) == [], "the socket's folder outlives its use"
    assert len(await tokens(client, ask("after"))) == 8
    await client.close()
    await client.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(RequestError, match="closed"):
        await tokens(client, ask("late"))


@pytest.mark.parametrize("launch", [EngineClient.launch, EngineClient.in_process])
async def test_what_can_not_start_says_why(
    launch: Callable[[EngineConfig], Awaitable[EngineClient]], tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=r"config\.json"):
        await launch(config_of(tmp_path))
