"""The client side of a load test: runs its share of the sessions and tells each request's times.

`python -m trunkline.bench.client` is one of several such processes: a job as a line of JSON on standard
input, a line "ready", then the time to start (of the system's monotonic clock), then a line for each request.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import msgspec

from trunkline.bench.datasets import Session
from trunkline.bench.dialects import DIALECTS, Conversation, Usage
from trunkline.http import EndpointError, HttpClient


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What to send, where, and how many requests may be in flight at once. `extra` goes into every body."""

    url: str
    headers: dict[str, str]
    dialect: str
    model: str
    sessions: list[Session]
    slots: int
    extra: dict[str, Any] = {}


class Sample(msgspec.Struct, kw_only=True):
    """One request. `due`: seconds since the start; `ttft` and `total`: seconds since it was due."""

    due: float = 0.0
    ttft: float = 0.0
    total: float = 0.0
    gaps: list[float] = []
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None
    code: str | None = None

    @property
    def tpot(self) -> float | None:
        """Seconds for each token after the first; None for one token."""
        return (self.total - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None


async def drive(job: Job, start: float, done: Callable[[Sample], None]) -> None:
    """Run all sessions; `start` is a time of `time.perf_counter`."""
    client = HttpClient(job.url, job.headers, tries=1)
    slots = asyncio.Semaphore(job.slots)
    try:
        await asyncio.gather(*(_run(job, session, client, slots, start, done) for session in job.sessions))
    finally:
        client.close()


async def _run(
    job: Job,
    session: Session,
    client: HttpClient,
    slots: asyncio.Semaphore,
    start: float,
    done: Callable[[Sample], None],
) -> None:
    """One session. A turn is due `pause` after the answer before; after an error nothing follows."""
    dialect = DIALECTS[job.dialect]
    conversation = dialect(session, job.model)
    due = start + session.due
    for turn in session.turns:
        due += turn.pause
        await asyncio.sleep(due - time.perf_counter())
        sample = Sample(due=due - start)
        async with slots:
            body = {**conversation.body(turn.content, turn.output_len), **job.extra}
            await _request(client, dialect.path, body, conversation, sample, due)
        done(sample)
        if sample.error is not None:
            return
        due += sample.total


async def _request(
    client: HttpClient,
    path: str,
    body: dict[str, Any],
    conversation: Conversation,
    sample: Sample,
    due: float,
) -> None:
    """One streaming request. What goes wrong is noted in the sample."""
    last, usage = 0.0, Usage()
    gaps: list[float] = []
    try:
        async with aclosing(client.events(path, body)) as events:
            async for event in events:
                now = time.perf_counter()
                if not conversation.read(event, usage):
                    continue
                if last:
                    gaps.append(now - last)
                else:
                    sample.ttft = now - due
                last = now
        if not last:
            raise EndpointError("the answer has no output", code="no_output", status=200)
        sample.total = last - due
    except (EndpointError, OSError, EOFError, ValueError, KeyError) as error:
        sample.error = str(error) or type(error).__name__
        sample.code = getattr(error, "code", type(error).__name__)
    sample.gaps = gaps
    sample.prompt_tokens, sample.cached_tokens = usage.prompt_tokens, usage.cached_tokens
    sample.output_tokens = usage.output_tokens


def main() -> None:
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    print("ready", flush=True)
    start = float(sys.stdin.buffer.readline())

    def done(sample: Sample) -> None:
        sys.stdout.buffer.write(msgspec.json.encode(sample) + b"\n")
        sys.stdout.buffer.flush()

    asyncio.run(drive(job, start, done))


if __name__ == "__main__":
    main()
