"""Clients that leave, steps that break and floods, against the whole server with a real core (P1, P9, P11).

The core is slowed down, so that each phase lasts long enough to be met.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import http_client
from tests.server.faults import Faults
from tests.server.test_http import running
from trunkline.config.schema import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, ServerConfig
from trunkline.engine.client import EngineClient
from trunkline.engine.frontend import Frontend
from trunkline.metrics.prometheus import Metrics
from trunkline.server.app import load_served_model
from trunkline.server.gate import Gate
from trunkline.server.routes import build_app

DELAY = 0.004  # seconds of a step
PLAIN = {"prompt": "hello", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "several": {"n": 3, "seed": 1, "temperature": 1.0},
    "logprobs": {"logprobs": 5, "echo": True},
    "grammar": {"regex": "[a-z ]{1,400}", "ignore_eos": False},
}
PHASES = ("waiting", "prefilling", "decoding", "paused", "compiling")


class World:
    """The application, its core, and what it holds."""

    def __init__(self, app: Gate, client: EngineClient, faults: Faults) -> None:
        self.app, self.client, self.faults = app, client, faults

    async def gauges(self) -> dict[str, float]:
        return (await self.client.stats()).gauges

    async def held(self) -> float:
        gauges = await self.gauges()
        return gauges["running"] + gauges["waiting"] + gauges["pages_in_use"]

    async def until(self, condition: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(60):
            while not await condition():
                await asyncio.sleep(0.002)

    async def idle(self) -> bool:
        return await self.held() == 0

    async def runs_and_waits(self, running: int, waiting: int) -> None:
        async def there() -> bool:
            gauges = await self.gauges()
            return gauges["running"] >= running and gauges["waiting"] >= waiting

        await self.until(there)


@contextlib.asynccontextmanager
async def world(model: Path, faults: Faults, **scheduler: Any) -> AsyncIterator[World]:
    limits = {"max_running": 3, "step_tokens": 16, "max_context": 512, "max_queued": 64} | scheduler
    config = EngineConfig(
        model=ModelConfig(path=str(model), served_model_name="tiny"),
        cache=CacheConfig(page_size=4, num_pages=512),
        scheduler=SchedulerConfig(**limits),
        server=ServerConfig(log_level="critical"),
    )
    client = await EngineClient.in_process(config)
    try:
        served = load_served_model(config)
        frontend = Frontend(client, served.tokenizer, config)
        yield World(build_app(frontend, served, Metrics("tiny", config.observe)), client, faults)
    finally:
        await client.close()


@pytest.fixture
async def slow(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    faults = Faults()
    faults.install(monkeypatch)
    async with world(tiny_model, faults) as made:
        yield made


# ---------------------------------------------------------------------- who leaves (P9)
async def enter(
    phase: str, at: World, http: httpx.AsyncClient, body: dict[str, Any]
) -> list[asyncio.Task[Any]]:
    """Bring a request into a phase. Returns it, and what else must leave."""
    others: list[asyncio.Task[Any]] = []

    def send(asked: dict[str, Any]) -> asyncio.Task[Any]:
        return asyncio.create_task(http.post("/v1/completions", json=asked))

    if phase == "waiting":
        others = [send({**PLAIN, "prompt": [9, index], "max_tokens": 400}) for index in range(3)]
        await at.runs_and_waits(3, 0)
        task = send(body)
        await at.runs_and_waits(3, 1)
    elif phase == "prefilling":
        at.faults.delay = 0.05
        task = send({**body, "prompt": list(range(5, 205))})
        await at.runs_and_waits(1, 0)
    elif phase == "paused":
        task = send(body)
        await at.runs_and_waits(1, 0)
        await at.client.pause("in_place")
    elif phase == "compiling":
        task = send({**body, "regex": f"[a-z]{{1,{random.randrange(200, 400)}}}", "ignore_eos": False})
        await at.until(lambda: _positive(at.held()))
    else:
        before = (await at.client.stats()).counters["generated_tokens"]
        task = send(body)
        await at.until(lambda: _more(at, before + 4))
    return [task, *others]


async def _positive(number: Awaitable[float]) -> bool:
    return await number > 0


async def _more(at: World, tokens: float) -> bool:
    return (await at.client.stats()).counters["generated_tokens"] > tokens


async def test_whoever_leaves_in_any_phase_leaves_nothing(slow: World) -> None:
    """Every phase, streamed or not, with every feature; then a plain request has the text that it had."""
    async with running(slow.app) as url, httpx.AsyncClient(base_url=url, timeout=60) as http:
        before = (await http.post("/v1/completions", json=PLAIN)).json()["choices"]
        for phase in PHASES:
            for stream in (False, True):
                for name, extra in FEATURES.items():
                    slow.faults.delay = DELAY
                    body = {**PLAIN, "max_tokens": 300, **extra, "stream": stream}
                    tasks = await enter(phase, slow, http, body)
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
                    await slow.until(slow.idle)
                    if phase == "paused":
                        await slow.client.resume()
                    assert all(task.cancelled() for task in tasks), (phase, stream, name)
        slow.faults.delay = 0
        assert (await http.post("/v1/completions", json=PLAIN)).json()["choices"] == before
    counters = (await slow.client.stats()).counters
    assert counters["requests"] == counters["finished"] + counters["aborted"]


async def test_an_abort_storm_gives_all_back_before_the_next_step(slow: World) -> None:
    slow.faults.delay = DELAY
    async with http_client(slow.app) as http:
        bodies = [
            {**PLAIN, "max_tokens": 400, **list(FEATURES.values())[i % 4], "rid": f"r{i}"} for i in range(16)
        ]
        tasks = [asyncio.create_task(http.post("/v1/completions", json=body)) for body in bodies]
        await slow.runs_and_waits(3, 8)
        for index in random.Random(3).sample(range(16), 9):
            await http.post("/abort_request", json={"rid": f"r{index}"})
        await slow.client.pause("in_place")  # no step from here on
        steps = slow.faults.steps
        await http.post("/abort_request", json={"abort_all": True})
        assert await slow.held() == 0 and slow.faults.steps == steps
        answers = [(await task).json() for task in tasks]
        reasons = [choice["finish_reason"] for answer in answers for choice in answer["choices"]]
        assert set(reasons) <= {"abort", "length", "stop"} and reasons.count("abort") >= 16
        await slow.client.resume()
        assert (await http.post("/v1/completions", json=PLAIN)).status_code == 200
    slow.faults.cores[0].scheduler.check()


# ---------------------------------------------------------------------- what breaks (P1)
async def test_faults_at_any_step_end_their_requests_only(slow: World) -> None:
    async with http_client(slow.app) as http:
        golden = (await http.post("/v1/completions", json=PLAIN)).json()["choices"]
        for where in ("forward", "sample", "result"):
            for ahead in (1, 2, 5, 9):
                slow.faults.breaks = {slow.faults.steps + ahead: where}
                broken = slow.faults.broken
                bodies = [{**PLAIN, **extra} for extra in FEATURES.values()]
                tasks = [asyncio.create_task(http.post("/v1/completions", json=body)) for body in bodies]
                answers = await asyncio.gather(*tasks)
                assert slow.faults.broken == broken + 1, (where, ahead)
                failed = [answer for answer in answers if answer.status_code != 200]
                assert failed and all(answer.status_code == 500 for answer in failed)
                assert {answer.json()["error"]["code"] for answer in failed} == {"step_failed"}
                assert "planted" not in "".join(answer.text for answer in answers)
                await slow.until(slow.idle)
                after = await http.post("/v1/completions", json=PLAIN)
                assert after.json()["choices"] == golden, (where, ahead)
        assert (await http.get("/health")).status_code == 200
    assert len(slow.faults.cores) == 1  # never restarted


# ---------------------------------------------------------------------- too many (P11)
async def test_five_times_the_capacity(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits is served, in full and in order; the rest is told at once when to come back."""
    faults = Faults(delay=DELAY)
    faults.install(monkeypatch)
    async with world(tiny_model, faults, max_running=4, max_queued=8) as at, http_client(at.app) as http:
        alone = (await http.post("/v1/completions", json=PLAIN)).json()["choices"][0]["text"]
        for _ in range(3):
            tasks = [asyncio.create_task(http.post("/v1/completions", json=PLAIN)) for _ in range(60)]
            answers = await asyncio.gather(*tasks)
            served = [answer for answer in answers if answer.status_code == 200]
            refused = [answer for answer in answers if answer.status_code == 429]
            assert (len(served), len(refused)) == (12, 48)
            assert {answer.json()["choices"][0]["text"] for answer in served} == {alone}
            assert {answer.json()["error"]["code"] for answer in refused} == {"queue_full"}
            assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
            assert await at.held() == 0
        counters = (await at.client.stats()).counters
        assert counters["finished"] == 1 + 3 * 12
