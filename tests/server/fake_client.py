"""An engine core that says what a test wants: deterministic tokens, delays, refusals, death."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from trunkline.messages import (
    AddRequest,
    Done,
    ProfileDone,
    Ready,
    RequestState,
    Snapshot,
    Stats,
    StepRecord,
    TokensOut,
    TreeEdge,
)
from trunkline.types import FinishReason, LogprobParams, PrefixMiss, RequestError, Timing, TokenLogprobs

MISS = PrefixMiss(reason="empty", prompt_tokens=9, matched=0, position=0, page_size=8, missed=8)


@dataclass
class FakeHealth:
    ok: bool = True
    reason: str = "ok"


@dataclass
class FakeClient:
    """`script` gives the output tokens of a request, before limits and stop tokens are applied."""

    script: Callable[[AddRequest], list[int]]
    eos: int
    vocab_size: int
    max_context: int = 512
    max_running: int = 8
    tokens_per_message: int = 1
    delay: float = 0.0  # seconds before each message
    cached: int = 0
    refusal: FinishReason | None = None
    dies_after: int | None = None  # messages
    health: FakeHealth = field(default_factory=FakeHealth)
    added: list[AddRequest] = field(default_factory=list)
    live: dict[str, asyncio.Event] = field(default_factory=dict)  # set: aborted
    left_early: list[str] = field(default_factory=list)
    flush_ok: bool = True
    paused: bool = False
    looks: int = 0  # snapshots taken
    ended_sessions: list[str] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)  # of each message, where they exist

    @property
    def ready(self) -> Ready:
        return Ready(
            max_context=self.max_context,
            num_pages=self.max_context,
            page_size=8,
            max_running=self.max_running,
            vocab_size=self.vocab_size,
            hidden_size=4,
        )

    async def stream(self, request: AddRequest) -> AsyncGenerator[TokensOut, None]:
        self.added.append(request)
        aborted = self.live[request.rid] = asyncio.Event()
        finished = False
        try:
            messages = self._messages(request)
            for count, message in enumerate(messages):
                if self.delay:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(aborted.wait(), self.delay)
                else:
                    await asyncio.sleep(0)
                if self.dies_after is not None and count >= self.dies_after:
                    finished = True
                    self.health.ok, self.health.reason = False, "killed by the test"
                    raise RequestError("the engine died", code="engine_dead", status=503)
                if aborted.is_set():
                    reason = FinishReason("abort", message="aborted", code="aborted")
                    message = TokensOut(rid=request.rid, finish=reason)
                finished = message.finish is not None
                yield message
                if finished:
                    return
        finally:
            del self.live[request.rid]
            if not finished:
                self.left_early.append(request.rid)

    def _messages(self, request: AddRequest) -> list[TokensOut]:
        if self.refusal is not None:
            return [TokensOut(rid=request.rid, finish=self.refusal)]
        tokens, finish = self._limited(request)
        size = self.tokens_per_message
        parts = [tokens[at : at + size] for at in range(0, len(tokens), size)] or [[]]
        wanted, now = request.logprobs, time.monotonic()
        return [
            TokensOut(
                rid=request.rid,
                token_ids=part,
                logprobs=None if wanted is None else [self._logprobs(token, wanted) for token in part],
                prompt_logprobs=self._prompt_logprobs(request) if at == 0 else None,
                cached_tokens=self.cached,
                embedding=self._vector(request) if at == len(parts) - 1 else b"",
                forced=[index for index in self.forced if index < len(part)],
                timing=Timing(now, now, now, now, [(now, now, 3)] * request.trace) if at == 0 else None,
                prefix_miss=MISS if at == 0 and request.explain_prefix != "no" else None,
                finish=finish if at == len(parts) - 1 else None,
            )
            for at, part in enumerate(parts)
        ]

    @staticmethod
    def _vector(request: AddRequest) -> bytes:
        """Four numbers that depend on the prompt and the kind of pooling."""
        if request.pooling is None:
            return b""
        first, last = request.token_ids[0], request.token_ids[-1]
        return struct.pack("<4f", 3.0, 4.0 if request.pooling == "last" else -4.0, 1.0 + first, 1.0 + last)

    def _limited(self, request: AddRequest) -> tuple[list[int], FinishReason]:
        params = request.params
        assert params.max_new_tokens is not None and params.sampling_seed is not None and params.n == 1
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {self.eos})
        tokens = self.script(request)
        for count, token in enumerate(tokens, 1):
            if token in stops and count > params.min_new_tokens:
                return tokens[:count], FinishReason("stop", matched=token)
            if count == params.max_new_tokens:
                return tokens[:count], FinishReason("length")
        if params.max_new_tokens == 0:
            return [], FinishReason("length")
        return [*tokens, self.eos], FinishReason("stop", matched=self.eos)

    @staticmethod
    def _logprobs(token: int, wanted: LogprobParams) -> TokenLogprobs:
        top = [((token + i) % 256, -0.5 - i) for i in range(wanted.top_n)]
        return TokenLogprobs(token, -0.5, top, [(other, -9.0) for other in wanted.token_ids])

    def _prompt_logprobs(self, request: AddRequest) -> list[TokenLogprobs] | None:
        if request.logprobs is None or request.logprobs.prompt_start is None:
            return None
        tokens = request.token_ids[request.logprobs.prompt_start :]
        first, rest = tokens[:1], tokens[1:]
        return [TokenLogprobs(token, None) for token in first] + [
            self._logprobs(token, request.logprobs) for token in rest
        ]

    async def abort(self, rid: str) -> None:
        if rid in self.live:
            self.live[rid].set()

    async def abort_anywhere(self, rid: str) -> None:
        raise AssertionError("there is one process only")

    async def abort_all(self) -> None:
        for event in self.live.values():
            event.set()

    async def end_session(self, session: str) -> None:
        self.ended_sessions.append(session)

    async def flush_cache(self) -> Done:
        return Done("x", self.flush_ok, "dropped 3 cached tokens" if self.flush_ok else "1 request runs")

    async def pause(self, mode: str) -> Done:
        self.paused = True
        return Done("x", True, f"{mode}, 0 wait")

    async def resume(self) -> Done:
        self.paused = False
        return Done("x", True, "0 requests wait")

    async def stats(self) -> Stats:
        gauges = {
            "running": float(len(self.live)),
            "waiting": 0.0,
            "compiling": 0.0,
            "pages_total": 64.0,
            "pages_in_use": 16.0,
        }
        gauges |= {"page_size": 8.0, "new_token_ratio": 0.5, "pages_cached": 4.0, "max_running": 8.0}
        counters = {"cached_tokens": 3.0, "prompt_tokens": 12.0, "retractions": 2.0, "evicted_tokens": 16.0}
        counters |= {"generated_tokens": 70.0, "computed_tokens": 90.0, "steps": 30.0}
        counters |= {"grammars": 2.0, "grammars_refused": 1.0}
        return Stats(call="x", gauges=gauges, counters=counters)

    async def start_profile(self, *, folder: str, name: str, **fields: object) -> ProfileDone:
        return ProfileDone("x", True, f"{folder}/{name}.trace.json")

    async def stop_profile(self) -> ProfileDone:
        return ProfileDone("x", True, "written")

    async def snapshot(self) -> Snapshot:
        self.looks += 1
        edges = [TreeEdge(1, 0, 0, 1, 0, 0, []), TreeEdge(2, 1, 32, 1, 0, 3, list(b"secret"))]
        request = RequestState("whose", 7, "running", 33, 32, 4, 16, 32, 0, 2, 1, False)
        stats = await self.stats()
        return Snapshot(
            call="x",
            now=100.0,
            gauges=stats.gauges,
            counters=stats.counters,
            num_edges=5,
            edges=edges,
            requests=[request],
            steps=[StepRecord(step, 90.0 + step, 0.01, 32, 1, 2) for step in range(3)],
        )
