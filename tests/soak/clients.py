"""Streaming clients that disconnect at random, and what must hold: the text that each request gets alone, no
error, and nothing held when they are gone.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

SYSTEMS = ("You are a helpful assistant.", "You answer briefly.", "You are a careful clerk. " * 8)
QUESTIONS = (
    "What is 17 + 15?",
    "Who are you?",
    "Sort these numbers: 9, 4, 7, 1",
    "Spell the word lantern.",
    "Tell me what you can do.",
    "What is 6 x 7? Answer with the number.",
)


@dataclass(frozen=True)
class Case:
    """One request body; the same body always gets the same text (P19)."""

    body: dict[str, Any]


@dataclass
class Tally:
    """What the clients saw."""

    finished: int = 0
    disconnected: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def cases(seed: int, count: int = 24) -> list[Case]:
    """Greedy and sampled chats that share system prompts, with and without stop strings."""
    rng = random.Random(seed)
    found = []
    for index in range(count):
        body: dict[str, Any] = {
            "messages": [
                {"role": "system", "content": rng.choice(SYSTEMS)},
                {"role": "user", "content": rng.choice(QUESTIONS)},
            ],
            "max_tokens": rng.randrange(4, 48),
            "temperature": rng.choice([0, 0.8, 1.2]),
            "seed": index,
            "stream": True,
        }
        if rng.random() < 0.3:
            body["stop"] = [rng.choice(["e", "\n", "7", "am"])]
        if rng.random() < 0.3:
            body["ignore_eos"] = True
        found.append(Case(body))
    return found


async def stream(client: httpx.AsyncClient, case: Case) -> AsyncGenerator[str, None]:
    """Yield the pieces of text of one streamed chat. Raises RuntimeError for anything but a clean stream."""
    ended = False
    async with client.stream("POST", "/v1/chat/completions", json=case.body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"status {response.status_code}: {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(f"error in the stream: {event['error']}")
                for choice in event.get("choices", ()):
                    yield choice["delta"].get("content") or ""
    if not ended:
        raise RuntimeError("the stream ended without [DONE]")


async def whole(client: httpx.AsyncClient, case: Case) -> str:
    return "".join([piece async for piece in stream(client, case)])


async def one_client(
    client: httpx.AsyncClient,
    number: int,
    expected: dict[int, str],
    all_cases: list[Case],
    until: float,
    tally: Tally,
) -> None:
    """Ask one thing after another; leave about a third of the streams at a random point."""
    rng = random.Random(number)
    while time.monotonic() < until:
        index = rng.randrange(len(all_cases))
        leave_after = rng.randrange(12) if rng.random() < 0.35 else None
        text, left = "", False
        try:
            pieces = stream(client, all_cases[index])
            count = 0
            async for piece in pieces:
                text += piece
                count += 1
                if leave_after is not None and count > leave_after:
                    left = True
                    break
            await pieces.aclose()
        except (RuntimeError, httpx.HTTPError) as error:
            tally.errors.append(f"{type(error).__name__}: {error}")
            continue
        if left:
            tally.disconnected += 1
            right = expected[index].startswith(text)
        else:
            tally.finished += 1
            right = text == expected[index]
        if not right:
            tally.wrong.append(f"case {index}: {text!r} instead of {expected[index]!r}")


async def gauges(client: httpx.AsyncClient) -> dict[str, float]:
    """Values of the metrics without labels, without their prefix."""
    text = (await client.get("/metrics")).text
    found = re.findall(r"^trunkline:(\w+)(?:\{[^}]*\})? ([0-9.eE+-]+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


async def wait_until_idle(client: httpx.AsyncClient, seconds: float = 10.0) -> dict[str, float]:
    """Poll until nothing runs and no page is held, or the time is up; return the last gauges."""
    end = time.monotonic() + seconds
    while True:
        now = await gauges(client)
        held = now["num_running_reqs"] + now["num_queue_reqs"] + now["num_used_tokens"]
        if held == 0 or time.monotonic() > end:
            return now
        await asyncio.sleep(0.1)


async def storm(
    url: str,
    clients: int,
    seconds: float,
    seed: int = 0,
    progress: Callable[[float, Tally], None] | None = None,
) -> dict[str, Any]:
    """Learn every case's text alone, then let the clients loose. Returns the figures of the run."""
    limits = httpx.Limits(max_connections=clients + 4, max_keepalive_connections=clients + 4)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        all_cases = cases(seed)
        expected = {index: await whole(client, case) for index, case in enumerate(all_cases)}
        tally, begin = Tally(), time.monotonic()
        running = [
            asyncio.create_task(one_client(client, number, expected, all_cases, begin + seconds, tally))
            for number in range(clients)
        ]
        while (left := [task for task in running if not task.done()]) and progress is not None:
            progress(time.monotonic() - begin, tally)
            await asyncio.wait(left, timeout=1.0)
        await asyncio.gather(*running)
        idle = await wait_until_idle(client)
        again = [await whole(client, case) for case in all_cases]
    changed = [index for index, text in enumerate(again) if text != expected[index]]
    return {
        "clients": clients,
        "seconds": round(time.monotonic() - begin, 1),
        "finished": tally.finished,
        "disconnected": tally.disconnected,
        "errors": len(tally.errors),
        "wrong_texts": len(tally.wrong),
        "texts_changed_afterwards": len(changed),
        "running_at_end": idle["num_running_reqs"],
        "waiting_at_end": idle["num_queue_reqs"],
        "tokens_held_at_end": idle["num_used_tokens"],
        "first_errors": tally.errors[:3] + tally.wrong[:3],
    }


def is_clean(figures: dict[str, Any]) -> bool:
    bad = (
        "errors",
        "wrong_texts",
        "texts_changed_afterwards",
        "running_at_end",
        "waiting_at_end",
        "tokens_held_at_end",
    )
    return figures["finished"] > 0 and not any(figures[name] for name in bad)
