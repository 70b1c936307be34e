"""The one loop: messages -> plan -> launch -> sample -> retire.

Depth 0 is synchronous, depth 1 overlaps the next step's scheduling with this step's computation; the code
is the same.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Any, Protocol

from trunkline.engine.guidance import Guidance
from trunkline.engine.profile import Profiler
from trunkline.engine.steplog import StepLog
from trunkline.messages import (
    Abort,
    AbortAnywhere,
    AddRequest,
    Done,
    EndSession,
    FlushCache,
    FromCore,
    GetSnapshot,
    GetStats,
    Gone,
    Hello,
    Outputs,
    Pause,
    Resume,
    Shutdown,
    Snapshot,
    StartProfile,
    Stats,
    StopProfile,
    ToCore,
    TokensOut,
)
from trunkline.scheduler.guide import failure
from trunkline.scheduler.plan import Masks, StepOutput, StepPlan
from trunkline.scheduler.scheduler import Scheduler
from trunkline.types import FinishReason, RequestError

log = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3  # in a row; then the fault is not a request's but the engine's
MAX_STATES = 256  # requests in a snapshot
HEAD_TOKENS = 16  # of each edge of the tree in a snapshot


class PendingOutput(Protocol):
    """Tokens that a step will have produced."""

    def result(self) -> StepOutput:
        """Wait until the tokens are on the host."""
        ...


class Worker(Protocol):
    """What computes. Applies plans strictly in order."""

    needs_host_seq_lens: bool  # the device can't run ahead of the host: retire everything before each plan

    def forward(self, plan: StepPlan) -> Any:
        """Apply the plan's changes of rows and pages and launch its forward pass."""
        ...

    def sample(self, step: Any, masks: Masks | None) -> PendingOutput:
        """Choose tokens, where there are masks only allowed ones, and put them into the rows, so that the
        next forward needs nothing from the host."""
        ...


class EngineDead(Exception):
    """The core can't go on."""


class EngineCore:
    """Owns a scheduler and a worker; `handle` takes messages in, `step` runs one step of the loop.

    `guidance` compiles the grammars of requests; without it they are refused.
    """

    def __init__(
        self, scheduler: Scheduler, worker: Worker, depth: int, guidance: Guidance | None = None
    ) -> None:
        self.scheduler = scheduler
        self.worker = worker
        self.guidance = guidance or Guidance()
        self.depth = depth
        self.steps = 0
        self.steplog = StepLog()
        self.profiler = Profiler()
        self.stopping = False
        self.paused = False
        self._in_flight: deque[tuple[StepPlan, PendingOutput]] = deque()
        self._failed_steps = 0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def can_step(self) -> bool:
        """Whether a step would do anything now: not while all requests wait for their grammars, or paused."""
        return not self.paused and (self.scheduler.can_step or self.guidance.has_news)

    # ------------------------------------------------------------------ messages
    def handle(self, message: ToCore) -> list[FromCore]:
        match message:
            case AddRequest():
                try:
                    self.guidance.check(message)
                    request = self.scheduler.add(message)
                except RequestError as error:
                    return [Outputs([TokensOut(rid=message.rid, finish=failure(error))])]
                self.guidance.start(request)
                return []
            case Abort(all=True):
                return [Outputs(self.scheduler.abort_all())]
            case Abort():
                self.scheduler.abort(message.rid)
                return []
            case EndSession():
                self.scheduler.cache.end_session(message.session)
                return []
            case FlushCache():
                return [self._flush(message.call)]
            case GetStats():
                return [Stats(call=message.call, gauges=self.scheduler.gauges(), counters=self._counters())]
            case GetSnapshot():
                return [self._snapshot(message)]
            case StartProfile() | StopProfile():
                return [self.profiler.handle(message)]
            case Hello() | Gone() | AbortAnywhere():
                return []  # of frontends, which are not known here
            case Pause():
                return self._pause(message)
            case Resume():
                self.paused = False
                return [Done(message.call, True, f"{self.scheduler.num_waiting} requests wait")]
            case Shutdown():
                self.stopping = True
                reason = FinishReason(
                    "abort", message="the engine is shutting down", code="shutdown", status=503
                )
                return [Outputs(self.scheduler.abort_all(reason))]

    def _counters(self) -> dict[str, float]:
        return {
            **self.scheduler.counters,
            **self.guidance.counters,
            "evicted_tokens": self.scheduler.cache.evicted_tokens,
        }

    def _snapshot(self, message: GetSnapshot) -> Snapshot:
        self.steplog.watch()
        cache = self.scheduler.cache
        return Snapshot(
            call=message.call,
            now=time.monotonic(),
            gauges=self.scheduler.gauges(),
            counters=self._counters(),
            num_edges=cache.num_edges,
            edges=cache.outline(message.nodes, HEAD_TOKENS),
            requests=self.scheduler.states(MAX_STATES),
            steps=self.steplog.records(),
        )

    def _pause(self, message: Pause) -> list[FromCore]:
        outputs: list[TokensOut] = []
        self._retire(0, outputs)
        self.paused = True
        if message.mode == "abort":
            reason = FinishReason("abort", message="aborted: generation was paused", code="aborted")
            outputs += self.scheduler.abort_all(reason)
        elif message.mode == "retract":
            self.scheduler.retract_all()
        left = f"{self.scheduler.num_running} requests hold their place, {self.scheduler.num_waiting} wait"
        return [Outputs(outputs), Done(message.call, True, left)]

    def expire(self) -> list[TokensOut]:
        """Ends of requests that waited or ran for too long."""
        return self.scheduler.expire()

    def _flush(self, call: str) -> Done:
        running, waiting = self.scheduler.num_running, self.scheduler.num_waiting
        if running or (waiting and not self.paused):
            return Done(call, False, f"{running} requests are running and {waiting} waiting: retry when idle")
        return Done(call, True, f"dropped {self.scheduler.cache.flush()} cached tokens")

    # ------------------------------------------------------------------ the loop
    def step(self) -> list[TokensOut]:
        """Run one step. Returns what requests got from the steps that it retired.

        Raises EngineDead after several broken steps in a row.
        """
        outputs: list[TokensOut] = []
        started = time.monotonic()
        for request, result in self.guidance.news():
            if isinstance(result, FinishReason):
                outputs += self.scheduler.refuse(request, result)
            else:
                outputs += self.scheduler.unblock(request, result)
        if self.worker.needs_host_seq_lens:
            self._retire(0, outputs)
        plan = self.scheduler.schedule()
        if plan.is_empty and not self._in_flight:
            return outputs
        self.steps += 1
        masks = self.guidance.begin_masks(self.scheduler.guided(plan) if plan.needs_prev_tokens else ())
        try:
            step = self.worker.forward(plan)
            if plan.needs_prev_tokens:
                self._retire(0, outputs)
                masks.add(self.scheduler.guided(plan))
            if plan.rows:
                self._in_flight.append((plan, self.worker.sample(step, masks.result())))
        except Exception as error:
            self._retire(0, outputs)  # what was launched before is not affected
            self._fence(plan, error, outputs)
        for request, reason in masks.failed:
            outputs += self.scheduler.refuse(request, reason)
        self._retire(self.depth if plan.rows else 0, outputs)
        self.steplog.record(plan, started)
        self.profiler.stepped()
        return outputs

    def _retire(self, down_to: int, outputs: list[TokensOut]) -> None:
        while len(self._in_flight) > down_to:
            plan, pending = self._in_flight.popleft()
            try:
                result = pending.result()
            except Exception as error:
                self._fence(plan, error, outputs)
            else:
                self._failed_steps = 0
                outputs += self.scheduler.retire(plan, result)

    def _fence(self, plan: StepPlan, error: Exception, outputs: list[TokensOut]) -> None:
        """A step broke: its requests end with an error, all others go on (P1)."""
        self._failed_steps += 1
        log.exception("step %d with %d rows failed", plan.step, len(plan.rows), exc_info=error)
        if plan.rows:
            reason = FinishReason(
                "abort", message=f"step {plan.step} of the engine failed", code="step_failed", status=500
            )
            outputs += self.scheduler.fail(plan, reason)
        if self._failed_steps >= MAX_FAILED_STEPS:
            raise EngineDead(
                f"{self._failed_steps} steps failed in a row, the last one with {error!r}"
            ) from error
