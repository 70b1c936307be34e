"""A minute of five times what a server can do, from clients that do not wait for each other (P11)."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.server.live import Server
from tests.soak.processes import Watch, server_processes

RUNNING, QUEUED = 4, 12
SECONDS, TIMES = 60.0, 5.0
BODY = {"prompt": "hello", "max_tokens": 400, "ignore_eos": True, "temperature": 0, "stream": True}


@dataclass
class Seen:
    """What the clients saw: seconds from request to first token and to the end, and how refusals came."""

    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)
    retry_after: list[int] = field(default_factory=list)
    refused_in: list[float] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    async def ask(self, http: httpx.AsyncClient) -> None:
        begun, first, text, done = time.monotonic(), 0.0, "", False
        async with http.stream("POST", "/v1/completions", json=BODY) as response:
            if response.status_code == 429:
                code = json.loads(await response.aread())["error"]["code"]
                self.retry_after.append(int(response.headers["retry-after"]))
                self.refused_in.append(time.monotonic() - begun)
                self.others += [code] if code not in ("queue_full", "too_many_requests") else []
                return
            async for line in response.aiter_lines():
                done = done or line == "data: [DONE]"
                if line.startswith("data: {"):
                    first = first or time.monotonic() - begun
                    event = json.loads(line[6:])
                    text += event["choices"][0]["text"] if "error" not in event else str(event)
        self.first.append(first)
        self.whole.append(time.monotonic() - begun)
        self.texts.add(text)
        self.others += [f"status {response.status_code}, done: {done}"] if not done else []


async def capacity(http: httpx.AsyncClient) -> float:
    """Requests that end each second while as many run as may, and as many wait."""
    seen, end = Seen(), time.monotonic() + 5.0

    async def one_after_another() -> None:
        while time.monotonic() < end:
            await seen.ask(http)

    begun = time.monotonic()
    await asyncio.gather(*(one_after_another() for _ in range(RUNNING + QUEUED)))
    assert not seen.retry_after and not seen.others
    return len(seen.whole) / (time.monotonic() - begun)


async def flood(http: httpx.AsyncClient, rate: float, watch: Watch) -> tuple[Seen, float]:
    """Poisson arrivals. Returns what was seen, and the seconds until the last one had its answer."""
    seen, rng, asked = Seen(), random.Random(0), []
    begun = at = sampled = time.monotonic()
    while (at := at + rng.expovariate(rate)) < begun + SECONDS:
        await asyncio.sleep(at - time.monotonic())
        asked.append(asyncio.create_task(seen.ask(http)))
        if at > sampled + 1.0:
            sampled = at
            watch.sample(at - begun)
    await asyncio.wait_for(asyncio.gather(*asked), timeout=SECONDS)  # nobody starves
    assert len(seen.whole) + len(seen.retry_after) == len(asked)
    return seen, time.monotonic() - begun


async def overload(url: str) -> tuple[Seen, float, float, Watch]:
    watch = Watch(server_processes(url))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
        able = await capacity(http)
        seen, seconds = await flood(http, TIMES * able, watch)
    return seen, seconds, able, watch


@pytest.mark.slow
def test_a_minute_at_five_times_the_capacity(tiny_model: Path) -> None:
    flags = ("--max-running-requests", str(RUNNING), "--max-queued-requests", str(QUEUED))
    server = Server(tiny_model, *flags)
    try:
        response = server.http.post("/v1/completions", json={**BODY, "stream": False})
        alone = response.json()["choices"][0]["text"]
        seen, seconds, able, watch = asyncio.run(overload(server.url))
        processes = watch.figures()
        rate = len(seen.whole) / seconds
        first = sorted(seen.first)
        p99 = first[int(0.99 * (len(first) - 1))]
        refusal = sorted(seen.refused_in)[int(0.99 * (len(seen.refused_in) - 1))]
        # Who is let in finds at most QUEUED ahead and RUNNING at work, each of whom takes 1 / rate of the
        # server; half as much again is for the unevenness of a shared machine. How long the way to the queue
        # takes is known from those who were turned back there.
        allowed = 1.5 * (QUEUED + RUNNING) / rate + refusal
        figures = {
            "capacity": able, "asked": len(first) + len(seen.retry_after), "served": len(first), "rate": rate,
            "p50_ttft": first[len(first) // 2], "p99_ttft": p99, "most_ttft": first[-1], "allowed": allowed,
            "p99_refusal": refusal,
            "retry_after": (min(seen.retry_after), max(seen.retry_after)), "processes": processes,
        }  # fmt: skip
        print(json.dumps(figures))
        assert not seen.others and seen.texts == {alone}
        assert (
            len(seen.retry_after) > len(first) and 1 <= min(seen.retry_after) <= max(seen.retry_after) <= 60
        )
        assert p99 <= allowed
        assert rate > able / 3  # refusals take time too, not most of it
        memory = {name: series for name, series in processes.items() if name.endswith("rss_mib")}
        assert len(memory) == 2 and not any(series["grows"] for series in memory.values()), memory
        assert server.pages_in_use() == 0
    finally:
        assert server.stop()[0] == 0
