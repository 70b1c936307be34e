"""The one scheduling rule.

Every request has tokens, and a number of them whose KV exists; each step moves the second number towards the
first. Prefill, chunked prefill, decode, verification of drafts and start from received KV are values of
`q_len`, not modes.

Only this module changes requests.
"""

from __future__ import annotations

import bisect
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice
from typing import Literal, NamedTuple, Protocol

from trunkline.cache import PrefixCache
from trunkline.config.schema import SchedulerConfig
from trunkline.messages import AddRequest, RequestState, TokensOut
from trunkline.scheduler.claims import PrefixClaims
from trunkline.scheduler.guide import Guide
from trunkline.scheduler.plan import Admit, PagesAt, RowOutput, RowStep, StepOutput, StepPlan, TokensAt
from trunkline.scheduler.policy import GrowthEstimate, admission_order, step_order, victim
from trunkline.scheduler.request import Request
from trunkline.scheduler.timeline import Timeline
from trunkline.scheduler.validate import output_limit
from trunkline.types import FinishReason, RequestError, TokenLogprobs

LOOK_INTERVAL = 0.1  # seconds between two looks for requests whose time is up


class Constraint(Protocol):
    """A feature's say in how many tokens a request may run in a step. Registered, never a branch below."""

    def limit(self, request: Request, q_len: int) -> int: ...


class GuidedRow(NamedTuple):
    """A row of a step that needs a mask; `at` is its place among the sampling rows. Tokens in `banned` may
    not be chosen unless the grammar allows nothing else."""

    at: int
    request: Request
    guide: Guide
    banned: frozenset[int]


class NoDraftsWhenGuided:
    """Masks are for one token: what stands in a draft, which is the worker's, no grammar has seen."""

    def limit(self, request: Request, q_len: int) -> int:
        return q_len if request.guide is None else min(q_len, request.base)


class Scheduler:
    """Composes steps (`schedule`), and applies what came out of them in order (`retire`).

    Any number of plans may be out at once: `schedule` reads only what was promised.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache: PrefixCache,
        eos_token_ids: tuple[int, ...],
        vocab_size: int,
        *,
        num_drafts: int = 0,
        constraints: Sequence[Constraint] = (),
        jump_forward: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.cache = cache
        self.vocab_size = vocab_size
        self.num_drafts = num_drafts
        self.counters = dict.fromkeys(COUNTERS, 0)
        self._eos = frozenset(eos_token_ids)
        self._jump_forward = jump_forward
        self._clock = clock
        self._next_look = 0.0  # for requests whose time is up
        self._constraints = (NoDraftsWhenGuided(), *constraints)
        self._requests: dict[str, Request] = {}
        self._blocked: set[Request] = set()  # not to be admitted yet: their grammars are being compiled
        self._waiting: list[Request] = []  # sorted by _place
        self._running: list[Request] = []  # in order of admission
        self._free_rows = list(range(config.max_running - 1, -1, -1))
        self._claims = PrefixClaims(cache.page_size)
        self._growth = GrowthEstimate(config.conservativeness)
        self._in_flight: deque[tuple[int, list[tuple[Request, int]]]] = (
            deque()
        )  # step, (request, epoch) per row
        self._arrivals = 0
        self._step = 0
        self._ran_prompts = False  # whether the last step ran prompt chunks, for mix "never"
        self._retires: list[int] = []  # for the next plan
        self._admits: list[Request] = []
        self._new_pages: list[PagesAt] = []
        self._appends: list[TokensAt] = []

    # ------------------------------------------------------------------ requests in and out
    @property
    def has_work(self) -> bool:
        return bool(self._requests) or bool(self._in_flight)

    @property
    def can_step(self) -> bool:
        """Whether there is work that waits for nothing from outside."""
        return len(self._requests) > len(self._blocked) or bool(self._in_flight)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._blocked)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, message: AddRequest, received: int = 0) -> Request:
        """Queue a request. KV of its first `received` tokens comes from another instance. One with a grammar
        waits for `unblock`.

        Raises RequestError for a duplicate id, a full queue, or a request that can't ever be served here.
        """
        if message.rid in self._requests:
            raise RequestError(
                f"a request with id {message.rid!r} is still running: ids of live requests are unique",
                code="duplicate_rid",
                param="rid",
            )
        capacity = self.config.max_running + self.config.max_queued
        if len(self._requests) >= capacity:
            raise RequestError(
                f"{len(self._requests)} requests are running or waiting, the limit is {capacity}: "
                "retry later (--max-queued-requests raises it)",
                code="queue_full",
                status=429,
            )
        limit = output_limit(message, self.config, self.cache, self.vocab_size)
        self._check_queued_tokens(len(message.token_ids))
        claims = (
            self._claims.fingerprints(message.cache_key, message.token_ids)
            if self._waits_for_prefixes
            else []
        )
        stops = frozenset(message.params.stop_token_ids)
        if not message.params.ignore_eos or message.grammar is not None:
            stops |= self._eos  # a grammar allows it where the output may end, and nothing but it at the end
        length = len(message.token_ids) + limit
        timeline = Timeline(self._clock(), message.trace)
        request = Request(message, self._arrivals, length, stops, received, claims, timeline)
        request.urgency = -message.priority if self.config.low_priority_first else message.priority
        self._arrivals += 1
        self._requests[message.rid] = request
        if message.grammar is None:
            if message.thinking is not None and message.thinking.max_tokens is not None:
                request.guide = Guide(None, (), message.thinking)
            self._enqueue(request)
        else:
            self._blocked.add(request)
        self.counters["requests"] += 1
        self.counters["prompt_tokens"] += request.prompt_len
        return request

    def _check_queued_tokens(self, prompt: int) -> None:
        queued, limit = self.queued_tokens, self.config.max_queued_tokens
        if queued and queued + prompt > limit:
            raise RequestError(
                f"prompts of {queued} tokens are waiting and this one has {prompt}, the limit is {limit}: "
                "retry later (--max-queued-tokens raises it)",
                code="queue_full",
                status=429,
            )

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens of the requests that wait."""
        return sum(request.prompt_len for request in chain(self._waiting, self._blocked))

    def unblock(self, request: Request, guide: Guide) -> list[TokensOut]:
        """The grammar of a request is there: it may be admitted, in the place of its arrival."""
        if request not in self._blocked:
            return []  # aborted meanwhile
        request.guide = guide
        request.timeline.compiled(self._clock())
        failed = self._jump(request)
        if failed is not None:
            return self.refuse(request, failed)
        self._blocked.remove(request)
        self._enqueue(request)
        return []

    def refuse(self, request: Request, reason: FinishReason) -> list[TokensOut]:
        """End a request whose grammar failed; nothing if it has ended already."""
        live = self._requests.get(request.rid) is request
        return self.abort(request.rid, reason) if live else []

    def abort(self, rid: str, reason: FinishReason | None = None) -> list[TokensOut]:
        """End a request in whatever phase and free all it holds at once. Unknown ids give an empty list."""
        request = self._requests.get(rid)
        if request is None:
            return []
        return [self._finish(request, reason or FinishReason("abort", message="aborted", code="aborted"))]

    def abort_all(self, reason: FinishReason | None = None) -> list[TokensOut]:
        return [out for rid in list(self._requests) for out in self.abort(rid, reason)]

    def expire(self) -> list[TokensOut]:
        """End requests that have waited for their first step, or run since then, for too long."""
        waiting, running = self.config.waiting_timeout, self.config.running_timeout
        now = self._clock()
        if not (waiting or running) or now < self._next_look:
            return []
        self._next_look = now + LOOK_INTERVAL
        outputs = []
        for request in list(self._requests.values()):
            begun = request.timeline.admitted
            spent = now - (request.timeline.arrived if begun is None else begun)
            limit = waiting if begun is None else running
            if limit and spent > limit:
                reason = _too_late(begun is not None, spent, limit, request.num_output)
                outputs += self.abort(request.rid, reason)
        return outputs

    def retract_all(self) -> None:
        """Take rows and pages from all running requests, and queue them again. Nothing may be in flight."""
        for request in reversed(self._running[:]):
            self._preempt(request)

    def fail(self, plan: StepPlan, reason: FinishReason) -> list[TokensOut]:
        """A step broke down: end the requests that were in it, and only those. Stands in for `retire`."""
        _, scheduled = self._next_in_flight(plan)
        return [
            out
            for request, epoch in scheduled
            if request.epoch == epoch
            for out in self.abort(request.rid, reason)
        ]

    @property
    def _waits_for_prefixes(self) -> bool:
        return self.config.prefill_wait and self.cache.enabled

    @staticmethod
    def _place(request: Request) -> tuple[int, int]:
        return -request.urgency, request.arrival

    def _enqueue(self, request: Request) -> None:
        bisect.insort(self._waiting, request, key=self._place)

    # ------------------------------------------------------------------ composing a step
    def schedule(self) -> StepPlan:
        """Compose the next step from promises alone; the results of steps in flight are not needed."""
        chosen: dict[Request, tuple[int, int]] = {}  # request -> (q_len, drafts of it)
        for prompts in self._kinds():
            budget = self._continue_running(chosen, prompts)
            if budget > 0 and prompts is not False:
                self._admit_waiting(chosen, budget)
            if chosen:
                break
        self._growth.stepped()
        return self._commit(chosen)

    def _kinds(self) -> tuple[bool | None, ...]:
        """Kinds of step to try: None may hold anything. With mix "never", True (prompt chunks) and False
        (rows that need one token) take turns, so that neither starves the other."""
        if self.config.mix == "always":
            return (None,)
        return (False, True) if self._ran_prompts else (True, False)

    def _continue_running(self, chosen: dict[Request, tuple[int, int]], prompts: bool | None) -> int:
        """Choose among running requests, preempting the latest when pages run out.

        Returns the budget left for new ones: 0 after a preemption.
        """
        budget, preempted = self.config.step_tokens, False
        order = step_order(self._running)
        singles = sum(request.base == 1 for request in order)
        for request in order:
            singles -= request.base == 1
            if request.row < 0 or (prompts is not None and (request.base > 1) != prompts):
                continue  # just preempted, or of the other kind
            q_len, drafts = self._fit(request, budget, singles)
            if q_len <= 0:
                continue
            while request.row >= 0 and not self._grow(request, request.computed + q_len):
                budget += self._make_way(self._next_victim(), chosen)
                preempted = True
            if request.row >= 0:
                chosen[request] = q_len, drafts
                budget -= q_len
        return 0 if preempted else budget

    def _fit(self, request: Request, budget: int, singles: int = 0) -> tuple[int, int]:
        """(q_len, drafts of it) that the request can run now; q_len 0 for nothing.

        Drafts leave a token of the budget for each of `singles` other rows.
        """
        base, remaining = request.base, request.remaining
        if request.pending and remaining <= 0:
            return 0, 0  # what is in flight may complete it
        drafts = max(0, min(request.drafts, remaining - 1, budget - base - singles))
        q_len = min(base + drafts, budget)
        for constraint in self._constraints:
            q_len = constraint.limit(request, q_len)
        return q_len, max(0, q_len - base)

    def _grow(self, request: Request, num_tokens: int) -> bool:
        lease = request.lease
        assert lease is not None
        start = len(lease.pages)
        if num_tokens <= start * self.cache.page_size:
            return True
        if not self.cache.grow(lease, num_tokens):
            return False
        self._new_pages.append(PagesAt(request.row, start, lease.pages[start:]))
        return True

    def _commit(self, chosen: dict[Request, tuple[int, int]]) -> StepPlan:
        """Promise what the step will do, and write it down as a plan."""
        admits = [self._admission(request) for request in self._admits]
        rows, now = [], self._clock()
        for request, (q_len, drafts) in chosen.items():
            samples = q_len - drafts == request.base
            request.computed += q_len
            request.pending += 1 + drafts if samples else 0
            request.drafts = self.num_drafts if samples else 0
            request.timeline.launch(now, q_len)
            rows.append(RowStep(request.row, q_len, drafts, samples))
        plan = StepPlan(
            step=self._step,
            retires=self._retires,
            admits=admits,
            new_pages=self._new_pages,
            appends=self._appends,
            rows=rows,
            needs_prev_tokens=any(
                row.samples and request.guide is not None for row, request in zip(rows, chosen, strict=True)
            ),
        )
        if rows:
            self._in_flight.append((self._step, [(request, request.epoch) for request in chosen]))
        self._step += 1
        self._ran_prompts = any(q_len - drafts > 1 for q_len, drafts in chosen.values())
        self._retires, self._admits, self._new_pages, self._appends = [], [], [], []
        self.counters["steps"] += bool(rows)
        self.counters["computed_tokens"] += plan.num_tokens
        return plan

    @staticmethod
    def _admission(request: Request) -> Admit:
        assert request.lease is not None
        return Admit(
            row=request.row,
            rid=request.rid,
            token_ids=list(request.tokens),
            prompt_len=request.prompt_len,
            computed=request.computed,
            pages=list(request.lease.pages),
            params=request.message.params,
            logprobs=request.message.logprobs,
            prompt_logprobs_from=request.next_prompt_logprob,
            guided=request.guide is not None,
            received=request.received,
            pooling=request.message.pooling,
        )

    # ------------------------------------------------------------------ admission
    def _admit_waiting(self, chosen: dict[Request, tuple[int, int]], budget: int) -> None:
        """Start waiting requests while rows, pages and budget last.

        One that waits for another's prefix is passed over. The first that doesn't fit ends it: letting
        smaller ones past would starve it.
        """
        if not self._waiting or budget <= 0 or not (self._free_rows or self._preempts):
            return
        reserved = sum(self._expected_pages(request) for request in self._running)
        for request in list(admission_order(self._waiting, self.config.policy, self._hit_tokens)):
            if budget <= 0:
                break
            if self._is_waiting_for_prefix(request):
                continue
            q_len, made_way = self._try_admit(request, budget, reserved), False
            while q_len == 0 and (other := self._less_urgent(request)) is not None:
                reserved -= self._expected_pages(other)
                budget += self._make_way(other, chosen)
                q_len, made_way = self._try_admit(request, budget, reserved), True
            if q_len == 0:
                break
            chosen[request] = q_len, 0
            budget -= q_len
            reserved += self._expected_pages(request)
            if made_way:
                break  # who made way waits again, perhaps before the others: the next step goes on in order

    @property
    def _preempts(self) -> bool:
        return self.config.preempt_above is not None

    def _next_victim(self) -> Request:
        """Who must leave when pages run out: the last admitted, of the least urgent where that counts."""
        found = victim(self._running, None, ()) if self._preempts else None
        return found or self._running[-1]

    def _less_urgent(self, request: Request) -> Request | None:
        """A running request that gives up its place for this one."""
        above = self.config.preempt_above
        if above is None or self._fit(request, 1)[0] <= 0:
            return None
        return victim(self._running, request.urgency - above, self._admits)

    def _make_way(self, request: Request, chosen: dict[Request, tuple[int, int]]) -> int:
        """Preempt a request. Returns the part of the step's budget that it had."""
        budget = chosen.pop(request)[0] if request in chosen else 0
        self._preempt(request)
        return budget

    def _hit_tokens(self, request: Request) -> int:
        if request.received:
            return request.received
        message = request.message
        return self.cache.match_length(message.cache_key, request.tokens, request.prefix_limit, message.turn)

    def _is_waiting_for_prefix(self, request: Request) -> bool:
        """Whether another request is computing what this one would compute next."""
        if request.received or not self._claims.num_claims:
            return False
        if not self._claims.is_claimed(request.awaits):
            hit = self._hit_tokens(request)
            request.awaits = self._claims.awaited(request.claims, hit, request.prefix_limit)
        return request.awaits is not None

    def _expected_pages(self, request: Request) -> int:
        """Pages that a running request is still expected to take."""
        assert request.lease is not None
        expected = len(request.tokens) + self._growth.tokens(request)
        return max(0, self.cache.pages_for(expected) - len(request.lease.pages))

    def _try_admit(self, request: Request, budget: int, reserved: int) -> int:
        """Give the request a row, its cached prefix and pages. Returns q_len, or 0 with nothing changed."""
        if not self._free_rows:
            return 0
        limit = 0 if request.received else request.prefix_limit
        message = request.message
        lease = request.lease = self.cache.acquire(message.cache_key, request.tokens, limit, message.turn)
        hit = request.received or len(lease.pages) * self.cache.page_size
        request.computed = hit
        q_len, _ = self._fit(request, budget)
        room = self.cache.available_pages >= self._expected_pages(request) + reserved or not self._running
        if q_len <= 0 or not room or not self.cache.grow(lease, hit + q_len):
            self.cache.release(lease)
            request.lease, request.computed = None, 0
            return 0
        request.settled = hit
        if request.cached_tokens is None:
            request.cached_tokens = min(hit, request.prompt_len)  # forced tokens behind it are output
            self.counters["cached_tokens"] += request.cached_tokens
            request.timeline.admit(self._clock())
            if request.message.explain_prefix != "no":
                request.prefix_miss = self.cache.explain(
                    lease, request.message.token_ids, limit, request.message.explain_prefix
                )
        self._waiting.remove(request)
        for other in self._waiting:
            other.bypassed += other.arrival < request.arrival
        self._running.append(request)
        request.row = self._free_rows.pop()
        self._admits.append(request)
        self._claims.claim(request.rid, request.claims, hit)
        return q_len

    # ------------------------------------------------------------------ leaving a row
    def _preempt(self, request: Request) -> None:
        """Take all from a running request and queue it again in its old place; its output so far stays."""
        self._leave_row(request)
        request.retractions += 1
        request.received = 0
        self.counters["retractions"] += 1
        self._growth.preempted(self._running)
        self._enqueue(request)

    def _leave_row(self, request: Request) -> None:
        assert request.lease is not None
        self._new_pages = [entry for entry in self._new_pages if entry.row != request.row]
        self._appends = [entry for entry in self._appends if entry.row != request.row]
        self._retires.append(request.row)
        self._free_rows.append(request.row)
        self._running.remove(request)
        self.cache.release(request.lease)
        self._claims.drop(request.rid)
        request.lease, request.row = None, -1
        request.pending = request.computed = request.settled = request.drafts = 0
        request.withdrawn = False
        request.epoch += 1
        request.timeline.leave()
        if not self._running:
            self._growth.idle()

    def guided(self, plan: StepPlan) -> list[GuidedRow]:
        """The rows of the latest plan whose next token a mask has to bound, while it is not sampled yet.

        Only those whose tokens are all known: before the steps in flight are retired, perhaps not all.
        """
        step, scheduled = self._in_flight[-1]
        assert step == plan.step
        found, at = [], 0
        for (request, epoch), row in zip(scheduled, plan.rows, strict=True):
            if row.samples:
                if request.guide is not None and request.epoch == epoch and request.pending == 1:
                    found.append(GuidedRow(at, request, request.guide, self._banned(request)))
                at += 1
        return found

    def _banned(self, request: Request) -> frozenset[int]:
        """Tokens that would end the output before `min_new_tokens`."""
        params = request.message.params
        below = request.num_output < params.min_new_tokens
        return self._eos.union(params.stop_token_ids) if below else frozenset()

    # ------------------------------------------------------------------ results
    def retire(self, plan: StepPlan, output: StepOutput) -> list[TokensOut]:
        """Apply the results of the oldest plan in flight. Results for requests that left are dropped."""
        _, scheduled = self._next_in_flight(plan)
        outputs = []
        for (request, epoch), step, result in zip(scheduled, plan.rows, output.rows, strict=True):
            if request.epoch != epoch:
                continue
            if result.error is not None:
                reason = FinishReason("abort", message=result.error, code="request_failed", status=500)
                outputs.append(self._finish(request, reason))
            else:
                outputs += self._apply(request, step, result)
        return outputs

    def _next_in_flight(self, plan: StepPlan) -> tuple[int, list[tuple[Request, int]]]:
        entry = self._in_flight.popleft()
        assert entry[0] == plan.step, f"step {plan.step} retired, step {entry[0]} is due"
        return entry

    def _apply(self, request: Request, step: RowStep, result: RowOutput) -> list[TokensOut]:
        if result.prompt_logprobs:
            request.prompt_logprobs += result.prompt_logprobs
        rejected, samples = 0, step.samples and not request.withdrawn
        if step.samples:
            request.withdrawn = False
        if samples:
            rejected = 1 + step.num_drafts - len(result.token_ids)
            request.pending -= 1 + step.num_drafts
            request.computed -= rejected
        request.settled += step.q_len - rejected
        if request.timeline.traced:
            request.timeline.end(self._clock(), samples)
        if not samples:
            self._publish(request)
            return []
        kept, reason = self._until_end(request, result.token_ids)
        if request.guide is not None and kept and request.guide.forced()[:1] == result.token_ids[:1]:
            request.forced.append(len(request.tokens))  # sampled, but the mask left nothing else
        request.tokens += result.token_ids[:kept]
        if request.guide is not None and reason is None:
            reason = request.guide.follow(result.token_ids[:kept])
            reason = reason or self._jump(request)
        self._publish(request)
        if reason is not None:
            return [self._finish(request, reason, result)]
        return [self._output(request, None, result)]

    def _jump(self, request: Request) -> FinishReason | None:
        """Append the tokens that the grammar dictates: `known` grows, and no step has to sample them.

        A step in flight may have been promised to sample the first of them: that promise is taken back. The
        last token of an output is always a sampled one, so that outputs end in one place only. With
        log-probabilities asked for, every token is sampled, since each then needs its own logits. Returns
        why the request must end, if it must.
        """
        guide = request.guide
        if guide is None or not self._jump_forward or request.message.logprobs is not None:
            return None
        forced = guide.forced()[: max(0, request.max_tokens - len(request.tokens) - 1)]
        ends = next((i for i, token in enumerate(forced) if token in request.stops), len(forced))
        failed = guide.follow(forced[:ends])
        if failed is not None or ends == 0:
            return failed
        start = len(request.tokens)
        request.tokens += forced[:ends]
        request.forced += range(start, start + ends)
        if request.row >= 0:
            self._appends.append(TokensAt(request.row, start, forced[:ends]))
            request.withdrawn, request.pending = request.pending > 0, 0
        return None

    @staticmethod
    def _until_end(request: Request, token_ids: list[int]) -> tuple[int, FinishReason | None]:
        """How many of the new tokens count, and why the request ends with the last of them, if it does."""
        room = request.max_tokens - len(request.tokens)
        for index, token in enumerate(token_ids[:room], start=1):
            if token in request.stops:
                return index, FinishReason("stop", matched=token)
        if len(token_ids) >= room and token_ids:
            return room, FinishReason("length")
        return len(token_ids), None

    def _publish(self, request: Request) -> None:
        """Share the pages that have become full."""
        lease, settled = request.lease, min(request.settled, len(request.tokens) - 1)
        assert lease is not None
        if settled < (lease.num_shared + 1) * self.cache.page_size:
            return
        swap = self.cache.publish(lease, request.tokens, settled)
        if swap is not None:
            self._new_pages.append(PagesAt(request.row, swap.start, swap.pages))
        self._claims.published(request.rid, settled)

    def _finish(self, request: Request, reason: FinishReason, result: RowOutput | None = None) -> TokensOut:
        out = self._output(request, reason, result)
        if request.row >= 0:
            if request.message.turn is not None and request.lease is not None:
                self.cache.keep(request.message.turn, request.lease)
            self._leave_row(request)
        elif request in self._blocked:
            self._blocked.remove(request)
        else:
            self._waiting.remove(request)
            request.epoch += 1
        del self._requests[request.rid]
        self.counters["aborted" if reason.kind == "abort" else "finished"] += 1
        return out

    def _output(self, request: Request, reason: FinishReason | None, result: RowOutput | None) -> TokensOut:
        """What is known and has not been sent. `result`: of the step whose token is the last of it."""
        first = request.prompt_len + request.sent
        token_ids = request.tokens[first:] if result is not None else []
        self.counters["generated_tokens"] += len(token_ids)
        logprobs = prompt_logprobs = None
        if result is not None and request.message.logprobs is not None:
            logprobs = (result.logprobs or [])[: len(token_ids)]
            start = request.message.logprobs.prompt_start
            if start is not None and request.sent == 0:  # with the first output
                before = [
                    TokenLogprobs(token, None) for token in request.message.token_ids[start : start + 1]
                ]
                prompt_logprobs = before + request.prompt_logprobs
        begins = result is not None and request.sent == 0
        forced = [at - first for at in request.forced] if result is not None and request.forced else []
        if result is not None:
            request.sent += len(token_ids)
            self.counters["forced_tokens"] += len(forced)
            request.forced.clear()
        return TokensOut(
            rid=request.rid,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            cached_tokens=request.cached_tokens or 0,
            retractions=request.retractions,
            forced=forced,
            embedding=b"" if result is None else result.embedding,
            timing=request.timeline.timing(self._clock()) if begins else None,
            prefix_miss=request.prefix_miss if begins else None,
            finish=reason,
        )

    # ------------------------------------------------------------------ what it looks like from outside
    def states(self, most: int) -> list[RequestState]:
        """At most `most` requests: running ones in order of admission, then waiting ones in their order."""
        queues: tuple[tuple[Literal["running", "waiting", "compiling"], Iterable[Request]], ...]
        queues = (("running", self._running), ("waiting", self._waiting), ("compiling", self._blocked))
        found = ((phase, request) for phase, queue in queues for request in queue)
        return [_state(phase, request) for phase, request in islice(found, most)]

    def gauges(self) -> dict[str, float]:
        free, evictable, total = self.cache.free_pages, self.cache.evictable_pages, self.cache.num_pages
        return {
            "running": len(self._running),
            "max_running": self.config.max_running,
            "waiting": self.num_waiting,
            "queued_tokens": self.queued_tokens,
            "compiling": len(self._blocked),
            "pages_total": total,
            "pages_free": free,
            "pages_cached": evictable,
            "pages_in_use": total - free - evictable,
            "page_size": self.cache.page_size,
            "new_token_ratio": self._growth.ratio,
        }

    def check(self) -> None:
        """Assert the invariants of requests, rows and cache. Linear in what is held; run when idle."""
        self.cache.check()
        rows = [request.row for request in self._running] + self._free_rows
        assert sorted(rows) == list(range(self.config.max_running)), "rows are lost or given twice"
        assert len(self._running) + self.num_waiting == len(self._requests)
        for request in self._running:
            assert request.lease is not None
            assert 0 <= request.settled <= request.computed, (
                f"{request.settled} settled, {request.computed} computed"
            )
            assert request.base >= 1, f"{request.rid}: computed {request.computed} is past what it can know"
            assert len(request.lease.pages) >= self.cache.pages_for(request.computed), "KV without pages"
        for request in self._waiting:
            assert request.lease is None and request.row < 0 and request.pending == request.computed == 0
        if not self._running:
            assert self._claims.num_claims == 0, "claims of requests that left"


def _too_late(begun: bool, spent: float, limit: float, num_output: int) -> FinishReason:
    if begun:
        message = (
            f"the request ran for {spent:.1f} s and has {num_output} tokens; the limit is {limit:g} s "
            "(--request-running-timeout): ask for fewer tokens"
        )
        return FinishReason("abort", message=message, code="running_timeout", status=504)
    message = (
        f"the request waited for {spent:.1f} s, the limit is {limit:g} s (--request-waiting-timeout): "
        "retry later"
    )
    return FinishReason("abort", message=message, code="waiting_timeout", status=503)


def _state(phase: Literal["running", "waiting", "compiling"], request: Request) -> RequestState:
    lease = request.lease
    return RequestState(
        rid=request.rid,
        arrival=request.arrival,
        phase=phase,
        prompt_tokens=request.prompt_len,
        computed=request.settled,
        output_tokens=request.num_output,
        max_output=request.max_tokens - request.prompt_len,
        cached_tokens=request.cached_tokens or 0,
        retractions=request.retractions,
        edge=0 if lease is None else lease.node.number,
        own_pages=0 if lease is None else len(lease.pages) - lease.num_shared,
        awaits_prefix=phase == "waiting" and request.awaits is not None,
    )


COUNTERS = (
    "requests",
    "finished",
    "aborted",
    "retractions",
    "steps",
    "prompt_tokens",
    "cached_tokens",
    "computed_tokens",
    "generated_tokens",
    "forced_tokens",
)
