"""Runs one case through the real scheduler, cache and loop, and checks everything that can be checked."""

from __future__ import annotations

import heapq
import logging
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from tests.sim.cases import Case, Submission, distinct_prompt_tokens, fits_context, make_case, pages_needed
from tests.sim.grammar import BAD, BREAKS, ToyCompiler, choices
from tests.sim.toy_lm import EOS_IDS, VOCAB_SIZE, Expected, generate
from tests.sim.worker import Arrival, ProtocolError, ToyWorker
from trunkline.cache import PrefixCache
from trunkline.engine.core import EngineCore
from trunkline.engine.guidance import Guidance
from trunkline.messages import (
    Abort,
    AddRequest,
    Done,
    EndSession,
    FlushCache,
    FromCore,
    GetStats,
    Outputs,
    Pause,
    PauseMode,
    Resume,
    Shutdown,
    Stats,
    TokensOut,
)
from trunkline.scheduler.plan import PagesAt, StepPlan
from trunkline.scheduler.policy import MAX_BYPASSED
from trunkline.scheduler.request import Request
from trunkline.scheduler.scheduler import Constraint, Scheduler
from trunkline.types import RequestError, TokenLogprobs

FAULT_CODES = ("request_failed", "step_failed")
GRAMMAR_FAULTS = {"invalid_grammar": BAD, "grammar_too_complex": BREAKS}  # code -> grammar that has it


class SimulationError(AssertionError):
    """What a case got wrong."""


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise SimulationError(message)


@dataclass(slots=True)
class Stream:
    """What the client of one request has seen so far."""

    submission: Submission
    message: AddRequest
    expected: Expected
    received: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    cached_tokens: int | None = None
    retractions: int = 0


@dataclass(frozen=True)
class AtMost:
    """A constraint as features register them."""

    most: int

    def limit(self, request: Request, q_len: int) -> int:
        return min(q_len, self.most)


@dataclass(frozen=True)
class Pauses:
    """A constraint that holds each request back every third time it is asked."""

    asked: Counter[str] = field(default_factory=Counter)

    def limit(self, request: Request, q_len: int) -> int:
        self.asked[request.rid] += 1
        return 0 if self.asked[request.rid] % 3 == 0 else q_len


def constraints_of(case: Case) -> list[Constraint]:
    found: list[Constraint] = [] if case.most_at_once is None else [AtMost(case.most_at_once)]
    return [*found, Pauses()] if case.pauses else found


def shared_pages(cache: PrefixCache) -> set[int]:
    """Pages that the prefix tree holds."""
    found: set[int] = set()
    stack = list(cache._roots.values())
    while stack:
        node = stack.pop()
        found.update(node.pages)
        stack.extend(node.children.values())
    return found


class Simulation:
    """One case in progress. `counts` says what happened, for coverage.

    `strict=False` leaves only what clients see: no invariants, and a worker that does whatever it is told.
    """

    def __init__(
        self, case: Case, trace: Callable[[StepPlan], None] | None = None, *, strict: bool = True
    ) -> None:
        self.case = case
        self.strict = strict
        self.cache = PrefixCache(case.num_pages, case.page_size, enabled=case.prefix_cache)
        self.scheduler = Scheduler(
            case.scheduler,
            self.cache,
            EOS_IDS,
            VOCAB_SIZE,
            num_drafts=case.num_drafts,
            constraints=constraints_of(case),
            jump_forward=case.jump_forward,
        )
        self.compiler = ToyCompiler(case.compile_steps)
        self.arrivals: dict[str, Arrival] = {}
        self.worker = ToyWorker(
            num_pages=case.num_pages,
            page_size=case.page_size,
            max_running=case.scheduler.max_running,
            step_tokens=case.scheduler.step_tokens,
            max_context=case.scheduler.max_context,
            num_drafts=case.num_drafts,
            depth=case.scheduler.depth,
            arrivals=self.arrivals,
            shared_pages=lambda: shared_pages(self.cache),
            needs_host_seq_lens=case.needs_host_seq_lens,
            breaks=case.breaks,
            strict=strict,
        )
        self.worker.trace = self._seen
        self._trace = trace
        guidance = Guidance(self.compiler, EOS_IDS, VOCAB_SIZE, beside=case.mask_beside)
        self.core = EngineCore(self.scheduler, self.worker, case.scheduler.depth, guidance)
        self.live: dict[str, Stream] = {}
        self.counts: Counter[str] = Counter()
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._num_events = self._steps = self._idle = 0

    # ------------------------------------------------------------------ the course of a case
    def run(self) -> Counter[str]:
        """Raises SimulationError, ProtocolError or AssertionError."""
        for entry in self.case.submissions:
            self._at(entry.at, partial(self.submit, entry, entry.message))
        for step in self.case.flush_at:
            self._at(step, self.flush)
        for step, mode in self.case.halts.items():
            self._at(step, partial(self._halt, mode))
        for step, session in self.case.session_ends.items():
            self._at(step, partial(self.core.handle, EndSession(session)))
        for at, event in (
            (self.case.abort_all_at, partial(self._abort_all, Abort("", all=True))),
            (self.case.shutdown_at, self._shutdown),
            (self.case.stats_at, self._stats),
        ):
            if at is not None:
                self._at(at, event)
        limit = self._step_limit()
        while self._events or self.core.has_work:
            while self._events and (self._events[0][0] <= self._steps or not self.core.has_work):
                self._steps = max(self._steps, self._events[0][0])
                heapq.heappop(self._events)[2]()
            if self.core.has_work:
                self.step()
                expect(self.counts["steps"] <= limit, f"livelock: more than {limit} steps")
        self.finish()
        return self.counts

    def step(self) -> None:
        outputs = self.core.step()
        self._steps += 1
        self.counts["steps"] += 1
        self.compiler.tick()
        for out in outputs:
            self._take(out)
        self._check()
        runs = outputs or self.worker.ran_rows or self.worker.in_flight
        self._idle = 0 if runs or not self.core.can_step else self._idle + 1
        expect(self._idle < 3, "livelock: there is work, but nothing runs")

    def _check(self) -> None:
        if self.strict:
            self.scheduler.check()
            expect(len(self.cache._leases) == self.scheduler.num_running, "leases without a running request")

    def _seen(self, plan: StepPlan) -> None:
        """Look at a plan on its way to the worker, when the waiting requests are still those it left."""
        if self._trace is not None:
            self._trace(plan)
        self.counts["swaps"] += sum(not self._is_growth(entry) for entry in plan.new_pages)
        self.counts["chunks"] += sum(not row.samples for row in plan.rows)
        jumped = {entry.row for entry in plan.appends}
        waited = [result.plan for result in self.worker.in_flight]
        self.counts["withdrawn"] += sum(row.row in jumped for late in waited for row in late.rows)
        self.counts["drafts"] += sum(row.num_drafts for row in plan.rows)
        self._check_order(plan)

    def _check_order(self, plan: StepPlan) -> None:
        """First come, first served; and a row that needs one token gets it in every step."""
        config, requests = self.case.scheduler, self.scheduler._requests
        if plan.admits and config.policy == "fcfs" and not config.prefill_wait:
            place = {rid: (-request.urgency, request.arrival) for rid, request in requests.items()}
            in_turn = [admit.rid for admit in plan.admits if requests[admit.rid].bypassed < MAX_BYPASSED]
            last = max((place[rid] for rid in in_turn), default=(-(1 << 30), 0))
            passed = [request.rid for request in self.scheduler._waiting if place[request.rid] < last]
            self.worker.require(not passed, f"first come, first served: {passed} were passed over")
        if config.mix == "always" and not constraints_of(self.case):
            rows = {row.row for row in plan.rows}
            for request in self.scheduler._running:
                ready = request.base == 1 and (request.remaining > 0 or not request.pending)
                self.worker.require(request.row in rows or not ready, f"{request.rid} was left out of a step")

    def _is_growth(self, entry: PagesAt) -> bool:
        row = self.worker.rows.get(entry.row)
        return row is None or entry.start >= len(row.table)

    def _at(self, step: int, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (step, self._num_events, event))
        self._num_events += 1

    def _step_limit(self) -> int:
        context = self.case.scheduler.max_context
        messages = [
            m for entry in self.case.submissions for m in (entry.message, entry.again) if m is not None
        ]
        limits = [context if m.params.max_new_tokens is None else m.params.max_new_tokens for m in messages]
        return (
            80
            + 7 * self.case.compile_steps
            + sum(min(context, len(m.token_ids) + new) for m, new in zip(messages, limits, strict=True))
        )

    # ------------------------------------------------------------------ what clients do
    def submit(self, entry: Submission, message: AddRequest) -> None:
        rid, config = message.rid, self.case.scheduler
        received = entry.received if message is entry.message else 0
        fits = (
            fits_context(message, config.max_context)
            and pages_needed(message, self.case.page_size, config.max_context) <= self.case.num_pages
        )
        duplicate, full = rid in self.live, len(self.live) >= config.max_running + config.max_queued
        before = self.arrivals.get(rid)
        self.arrivals[rid] = Arrival(message.cache_key, received, entry.fails_at)
        refused = self._add(message, received)
        if not fits or duplicate or full:
            expect(refused, f"{rid} should have been refused")
            self.counts["refused"] += 1
            if before is not None:
                self.arrivals[rid] = before
            return
        expect(not refused, f"{rid} was refused")
        self.counts["requests"] += 1
        self.counts["received"] += received > 0
        longest = min(config.max_context, self.case.num_pages * self.case.page_size)
        self.live[rid] = Stream(entry, message, generate(message, longest), received)
        if entry.abort_after is not None and message is entry.message:
            self._at(self._steps + entry.abort_after, partial(self.abort, entry))

    def _add(self, message: AddRequest, received: int) -> bool:
        if received:
            try:
                self.core.guidance.start(self.scheduler.add(message, received=received))
            except RequestError:
                return True
            return False
        answers = self.core.handle(message)
        if not answers:
            return False
        (out,) = self._items(answers)
        finish = out.finish
        expect(finish is not None and finish.kind == "abort" and bool(finish.code), f"refusal: {out}")
        return True

    def abort(self, entry: Submission) -> None:
        rid = entry.message.rid
        stream = self.live.get(rid)
        if stream is None or stream.message is not entry.message:
            return  # it has ended
        self.counts[f"aborted_{self._phase(rid)}"] += 1
        del self.live[rid]
        expect(not self.core.handle(Abort(rid)), "an abort of one request gives no output")
        self._check()
        if entry.again is not None:
            self.counts["id_reused"] += 1
            self.submit(entry, entry.again)

    def _phase(self, rid: str) -> str:
        request = self.scheduler._requests[rid]
        if request in self.scheduler._blocked:
            return "compiling"
        if request.row < 0:
            return "preempted" if request.retractions else "waiting"
        return "prefill" if len(request.tokens) == request.prompt_len else "decode"

    def _shutdown(self) -> None:
        self._abort_all(Shutdown())
        expect(self.core.stopping, "a shutdown that does not stop")
        self._events.clear()  # nobody sends to a core that is going

    def _stats(self) -> None:
        (answer,) = self.core.handle(GetStats("call"))
        assert isinstance(answer, Stats) and answer.call == "call"
        gauges, cache = answer.gauges, self.cache
        expect(gauges["running"] + gauges["waiting"] == len(self.live), f"gauges do not add up: {gauges}")
        pages = gauges["pages_free"] + gauges["pages_cached"] + gauges["pages_in_use"]
        expect(pages == gauges["pages_total"] == cache.num_pages, f"pages do not add up: {gauges}")
        expect(answer.counters["requests"] == self.counts["requests"], f"counters: {answer.counters}")
        self.counts["stats"] += 1

    def _abort_all(self, message: Abort | Shutdown) -> None:
        items = self._items(self.core.handle(message))
        expect({out.rid for out in items} == set(self.live), "abort of all: outputs and live requests differ")
        expect(all(out.finish and out.finish.kind == "abort" for out in items), "abort of all: no finish")
        self.counts["aborted_all" if isinstance(message, Abort) else "shut_down"] += len(items)
        self.live.clear()

    def _halt(self, mode: PauseMode) -> None:
        """Pause, let the cache be flushed where nothing holds a page, and go on."""
        answers = self.core.handle(Pause("call", mode))
        for out in self._items(answers):
            if mode == "abort" and out.finish is not None and out.finish.kind == "abort":
                self.live.pop(out.rid)
            else:
                self._take(out)
        expect(isinstance(answers[-1], Done) and not self.core.can_step, "not paused")
        self.worker.require(not self.worker.in_flight, "steps are in flight in a pause")
        if mode != "in_place":
            expect(self.scheduler.num_running == 0, f"{mode}: requests still run")
            (done,) = self.core.handle(FlushCache("call"))
            expect(isinstance(done, Done) and done.ok, "the cache can't be flushed in a pause")
            expect(self.cache.free_pages == self.cache.num_pages, "pages are held in a pause")
            self.counts["retracted_all"] += len(self.live) if mode == "retract" else 0
        self._check()
        self.core.handle(Resume("call"))

    @staticmethod
    def _items(answers: list[FromCore]) -> list[TokensOut]:
        return [item for answer in answers if isinstance(answer, Outputs) for item in answer.items]

    def flush(self) -> None:
        (answer,) = self.core.handle(FlushCache("call"))
        expect(isinstance(answer, Done) and answer.call == "call", f"answer to flush: {answer}")
        assert isinstance(answer, Done)
        expect(answer.ok == (not self.live), f"flush ok={answer.ok} with {len(self.live)} live requests")
        if answer.ok:
            expect(self.cache.free_pages == self.cache.num_pages, "pages are held after a flush")
            self.counts["flushed"] += 1

    # ------------------------------------------------------------------ what clients get
    def _take(self, out: TokensOut) -> None:
        stream = self.live.get(out.rid)
        if stream is None:
            raise SimulationError(f"output of {out.rid}, which has ended or was aborted: {out}")
        self._check_counts(stream, out)
        want = stream.expected
        stream.token_ids += out.token_ids
        stream.logprobs += out.logprobs or []
        self.counts["tokens"] += len(out.token_ids)
        self.counts["forced"] += len(out.forced)
        self._check_forced(stream, out)
        if out.prompt_logprobs is not None:
            expect(stream.prompt_logprobs is None, f"{out.rid}: prompt logprobs came twice")
            stream.prompt_logprobs = out.prompt_logprobs
        num = len(stream.token_ids)
        expect(
            stream.token_ids == want.token_ids[:num],
            f"{out.rid}: tokens {stream.token_ids}, naive generation gives {want.token_ids}",
        )
        if want.logprobs is not None:
            expect(stream.logprobs == want.logprobs[:num], f"{out.rid}: logprobs of outputs differ")
        if out.finish is None:
            expect(bool(out.token_ids), f"{out.rid}: an output without tokens")
            return
        del self.live[out.rid]
        if out.finish.kind == "abort":
            self._check_fault(stream, out)
            return
        self.counts["finished"] += 1
        expect(out.finish == want.finish, f"{out.rid}: finish {out.finish}, should be {want.finish}")
        expect(num == len(want.token_ids), f"{out.rid}: {num} tokens, should be {len(want.token_ids)}")
        if (
            self.strict and self.case.prefix_cache and not self.worker.needs_host_seq_lens
        ):  # else evicted since
            tokens = stream.message.token_ids + stream.token_ids
            hit = self.cache.match_length(stream.message.cache_key, tokens, len(tokens) - 1)
            whole = (len(tokens) - 1) // self.case.page_size * self.case.page_size
            expect(hit == whole, f"{out.rid}: {hit} of {whole} tokens are in the cache when it ends")
        expect(out.embedding == want.embedding, f"{out.rid}: its vector differs")
        self.counts["pooled"] += bool(out.embedding)
        expect(
            stream.prompt_logprobs == want.prompt_logprobs,
            f"{out.rid}: prompt logprobs {stream.prompt_logprobs}, should be {want.prompt_logprobs}",
        )

    def _check_forced(self, stream: Stream, out: TokensOut) -> None:
        """Only tokens of a grammar that left no choice."""
        first, message = len(stream.token_ids) - len(out.token_ids), stream.message
        for index in out.forced:
            left = choices(message, stream.token_ids[: first + index])
            expect(left == {out.token_ids[index]}, f"{out.rid}: {left} could follow, yet a token was forced")

    def _check_counts(self, stream: Stream, out: TokensOut) -> None:
        if out.finish is not None and out.finish.kind == "abort":
            return
        cached, prompt = out.cached_tokens, len(stream.message.token_ids)
        expect(stream.cached_tokens in (None, cached), f"{out.rid}: cached_tokens changed to {cached}")
        if stream.cached_tokens is None:
            self.counts["cached_tokens"] += cached
        stream.cached_tokens = cached
        dictated = stream.message.grammar is not None  # what is dictated first stands behind the prompt
        expect(0 <= cached < prompt + dictated, f"{out.rid}: {cached} of {prompt} prompt tokens cached")
        if not stream.received and not (dictated and cached == prompt):
            expect(cached % self.case.page_size == 0, f"{out.rid}: {cached} tokens cached, not whole pages")
            expect(
                self.case.prefix_cache or cached == 0, f"{out.rid}: {cached} tokens cached without a cache"
            )
        expect(out.retractions >= stream.retractions, f"{out.rid}: retractions went down")
        self.counts["retractions"] += out.retractions - stream.retractions
        stream.retractions = out.retractions

    def _check_fault(self, stream: Stream, out: TokensOut) -> None:
        assert out.finish is not None
        if out.finish.code in GRAMMAR_FAULTS:
            spec, wrong = stream.message.grammar, GRAMMAR_FAULTS[out.finish.code]
            expect(spec is not None and spec.source == wrong, f"{out.rid}: ended by {out.finish}")
            self.counts[out.finish.code] += 1
            return
        planted = (
            stream.submission.fails_at >= 0 if out.finish.code == "request_failed" else bool(self.case.breaks)
        )
        expect(out.finish.code in FAULT_CODES and planted, f"{out.rid}: ended by {out.finish}")
        self.counts[out.finish.code or ""] += 1

    # ------------------------------------------------------------------ the end
    def finish(self) -> None:
        self.core.guidance.close()
        self.counts["masks"] += self.compiler.asked["masks"]
        expect(not self.live, f"requests without an end: {list(self.live)}")
        self.core.step()  # hands over the last retires
        expect(not (self.strict and self.worker.rows), f"rows never retired: {sorted(self.worker.rows)}")
        expect(not self.worker.in_flight, "results never fetched")
        expect(not self.core.has_work, "work without requests")
        if self.strict:
            self._check_end()

    def _check_end(self) -> None:
        self.scheduler.check()
        cache, counters = self.cache, self.scheduler.counters
        expect(cache.available_pages == cache.num_pages, "pages are still held at the end")
        cache.flush()
        expect(cache.free_pages == cache.num_pages, "pages are lost")
        expect(not cache._leases and not cache._roots, "leases or keys are left")
        ended = counters["finished"] + counters["aborted"]
        expect(
            counters["requests"] == ended == self.counts["requests"], f"requests do not add up: {counters}"
        )
        expect(counters["finished"] == self.counts["finished"], f"finished do not add up: {counters}")
        expect(counters["forced_tokens"] == self.counts["forced"], f"forced tokens do not add up: {counters}")
        expect(counters["generated_tokens"] == self.counts["tokens"], f"tokens do not add up: {counters}")
        if not self.case.breaks:
            expect(
                counters["computed_tokens"] == self.worker.computed_tokens, f"steps do not add up: {counters}"
            )
        if self.case.exact:
            want = distinct_prompt_tokens(self.case)
            found = self.worker.computed_prompt_tokens
            expect(found == want, f"{found} prompt tokens computed, the prompt tree has {want}")


def run_case(
    case: Case, trace: Callable[[StepPlan], None] | None = None, *, strict: bool = True
) -> Counter[str]:
    """Counts of what happened. Raises SimulationError (an AssertionError) for whatever is wrong."""
    try:
        return Simulation(case, trace, strict=strict).run()
    except ProtocolError as error:
        raise SimulationError(f"protocol: {error}") from error


@contextmanager
def without_logging() -> Iterator[None]:
    """The engine logs the faults that cases plant."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def describe(error: Exception) -> str:
    """One line: what was wrong, and where when the error does not say."""
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    if str(error):
        return kind + str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{kind}{frame.name}: {frame.line}"


def run_chunk(seeds: range) -> tuple[Counter[str], list[tuple[int, str]]]:
    """Counts, and (seed, what was wrong) of failing cases."""
    counts: Counter[str] = Counter()
    failed = []
    for seed in seeds:
        with without_logging():
            try:
                counts += run_case(make_case(seed))
            except Exception as error:
                failed.append((seed, describe(error)))
    return counts, failed
