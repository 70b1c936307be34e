"""A worker without tensors. It obeys plans to the letter and trusts nothing.

Pages are lists of slots; a slot is None until it is written. Sampled tokens go to the row's own buffer at
once, while the host sees them only through `ToyResult.result()`, as on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tests.sim.toy_lm import Chooser, draft, pooled, slot_of, start_state, token_logprobs
from trunkline.scheduler.plan import (
    Admit,
    Masks,
    PagesAt,
    RowOutput,
    RowStep,
    StepOutput,
    StepPlan,
    TokensAt,
)
from trunkline.types import CacheKey, LogprobParams, Pooling, TokenLogprobs


class ProtocolError(BaseException):
    """A plan that no worker could run, or that would read or overwrite KV that is not the row's.

    Not an Exception: the engine ends the requests of a step that raises one, and goes on.
    """


def _tolerate(condition: bool, message: str) -> None:
    """Stands in for `require` where outputs alone are to show what is wrong."""


class WorkerFault(Exception):
    """A planted breakdown of a step, as of a device out of memory: the engine must fence it."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ProtocolError(message)


@dataclass(slots=True)
class Arrival:
    """What the worker's surroundings know of a request beyond the plan: its adapter, KV sent by another
    instance, and after how many of its steps it breaks."""

    key: CacheKey
    received: int = 0
    fails_at: int = -1


@dataclass(slots=True)
class Row:
    rid: str
    tokens: list[int]
    prompt_len: int
    computed: int
    table: list[int]
    start: int  # state before the first position
    choose: Chooser
    wanted: LogprobParams | None
    report_from: int | None
    arrival: Arrival
    drafts: list[int]
    pooling: Pooling | None = None
    states: list[int] = field(default_factory=list)  # of the positions run so far, for the mean
    steps: int = 0
    broken: bool = False  # a step of it failed: its KV is not to be trusted from there on


@dataclass(slots=True)
class Computed:
    """One row's forward pass: the tokens run and what each of their positions attended to."""

    row: Row
    step: RowStep
    tokens: list[int]
    first: int  # position of the first
    attended: list[int]


@dataclass(slots=True)
class ToyStep:
    plan: StepPlan
    rows: list[Computed]


class ToyResult:
    """Tokens on their way to the host."""

    def __init__(self, worker: ToyWorker, plan: StepPlan, output: StepOutput, breaks: bool) -> None:
        self._worker, self.plan, self._output, self._breaks = worker, plan, output, breaks

    def result(self) -> StepOutput:
        flying = self._worker.in_flight
        self._worker.require(
            bool(flying) and flying[0] is self, "results are fetched once each, oldest first"
        )
        del flying[0]
        if self._breaks:
            raise WorkerFault(f"result of step {self.plan.step}")
        return self._output


class ToyWorker:
    """Implements `forward` and `sample` of engine.core.Worker over the toy language model.

    `arrivals`: by rid, what plans do not carry. `shared_pages`: the pages that the prefix tree holds now.
    Whether a plan is right is asserted here; whether its output is right shows at the end.
    """

    needs_host_seq_lens: bool

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_running: int,
        step_tokens: int,
        max_context: int,
        num_drafts: int,
        depth: int,
        arrivals: dict[str, Arrival],
        shared_pages: Callable[[], set[int]],
        needs_host_seq_lens: bool = False,
        breaks: dict[int, str] | None = None,
        strict: bool = True,
    ) -> None:
        self.page_size, self.num_pages, self.max_running = page_size, num_pages, max_running
        self.step_tokens, self.max_context = step_tokens, max_context
        self.num_drafts, self.depth = num_drafts, depth
        self.needs_host_seq_lens = needs_host_seq_lens
        self.require = require if strict else _tolerate
        self.arrivals, self.shared_pages = arrivals, shared_pages
        self.breaks = breaks or {}  # step -> which of "forward", "sample", "result" raises
        self.kv: list[list[int | None]] = [[None] * page_size for _ in range(num_pages)]
        self.holders = [0] * num_pages  # live rows whose page table has the page
        self.rows: dict[int, Row] = {}
        self.in_flight: list[ToyResult] = []
        self._new: list[tuple[Row, int]] = []  # pages that the plan being applied gave out
        self._received: list[tuple[int, int, int]] = []  # (page, offset, slot) sent by another instance
        self.computed_tokens = self.computed_prompt_tokens = 0
        self.trace: Callable[[StepPlan], None] | None = None
        self.ran_rows = False  # whether the last plan had any
        self.last_step = -1

    # ------------------------------------------------------------------ the contract
    def forward(self, plan: StepPlan) -> ToyStep:
        self.require(plan.step > self.last_step, f"step {plan.step} after step {self.last_step}")
        self.last_step = plan.step
        self.require(not (self.needs_host_seq_lens and self.in_flight), "a plan that ran ahead of the host")
        self.ran_rows = bool(plan.rows)
        if self.trace is not None:
            self.trace(plan)
        shared = self.shared_pages()
        for number in plan.retires:
            self.require(number in self.rows, f"retire of row {number}, which is not live")
            self._hold(self.rows.pop(number).table, -1)
        for admit in plan.admits:
            self._admit(admit, shared)
        for change in plan.new_pages:
            self._change_table(change)
        self._settle_new_pages(shared)
        for entry in plan.appends:
            self._append(entry)
        self._break("forward", plan)
        self.require(
            plan.num_tokens <= self.step_tokens, f"{plan.num_tokens} tokens, budget {self.step_tokens}"
        )
        numbers = [step.row for step in plan.rows]
        self.require(len(set(numbers)) == len(numbers), "a row occurs twice in one step")
        self.computed_tokens += plan.num_tokens
        fails = plan.step in self.breaks
        return ToyStep(plan, [self._run(step, shared, fails) for step in plan.rows])

    def sample(self, step: ToyStep, masks: Masks | None) -> ToyResult:
        self._break("sample", step.plan)
        sampling = [computed for computed in step.rows if computed.step.samples]
        choices: dict[int, frozenset[int]] = {}  # by row
        if masks is not None:
            self.require(step.plan.needs_prev_tokens, "masks that the plan did not announce")
            self.require(not self.in_flight, "masks made while tokens before them were not known")
            self.require(list(masks.at) == sorted(set(masks.at)), f"masks at {masks.at}")
            for at, words in zip(masks.at, masks.words, strict=True):
                bits = np.unpackbits(words.view(np.uint8), bitorder="little")
                self.require(bool(bits.any()), "a mask that allows nothing")
                choices[sampling[at].step.row] = frozenset(np.flatnonzero(bits).tolist())
        output = StepOutput([self._sample(computed, choices) for computed in step.rows])
        result = ToyResult(self, step.plan, output, self.breaks.get(step.plan.step) == "result")
        self.in_flight.append(result)
        self.require(
            len(self.in_flight) <= self.depth + 1,
            f"{len(self.in_flight)} steps in flight at depth {self.depth}",
        )
        return result

    def _break(self, where: str, plan: StepPlan) -> None:
        if self.breaks.get(plan.step) == where:
            raise WorkerFault(f"{where} of step {plan.step}")

    # ------------------------------------------------------------------ rows and page tables
    def _hold(self, pages: list[int], change: int) -> None:
        for page in pages:
            self.holders[page] += change

    def _admit(self, admit: Admit, shared: set[int]) -> None:
        what = f"admit of {admit.rid} to row {admit.row}"
        self.require(0 <= admit.row < self.max_running, f"{what}: no such row")
        self.require(admit.row not in self.rows, f"{what}: the row is live")
        self.require(
            all(row.rid != admit.rid for row in self.rows.values()), f"{what}: the request has a row"
        )
        self.require(admit.rid in self.arrivals, f"{what}: unknown request")
        self.require(
            0 <= admit.computed < len(admit.token_ids), f"{what}: {admit.computed} of the tokens computed"
        )
        self.require(
            0 < admit.prompt_len <= len(admit.token_ids), f"{what}: prompt length {admit.prompt_len}"
        )
        arrival = self.arrivals[admit.rid]
        row = Row(
            rid=admit.rid,
            tokens=list(admit.token_ids),
            prompt_len=admit.prompt_len,
            computed=admit.computed,
            table=[],
            start=start_state(arrival.key),
            choose=Chooser.of(admit.params),
            wanted=admit.logprobs,
            report_from=admit.prompt_logprobs_from,
            arrival=arrival,
            drafts=[],
            pooling=admit.pooling,
        )
        if row.report_from is not None:
            self.require(
                1 <= row.report_from < row.prompt_len, f"{what}: prompt logprobs from {row.report_from}"
            )
            self.require(
                row.computed < row.report_from, f"{what}: position {row.report_from} has no logits to report"
            )
        if row.pooling == "mean":
            self.require(row.computed == 0, f"{what}: {row.computed} positions are missing in the mean")
        self.rows[admit.row] = row
        filled = -(-row.computed // self.page_size)
        self.require(
            len(admit.pages) >= filled, f"{what}: {len(admit.pages)} pages for {row.computed} tokens"
        )
        hit = 0 if admit.received else filled  # pages that come from the tree
        self.require(
            all(page in shared for page in admit.pages[:hit]), f"{what}: computed pages that nobody shares"
        )
        if admit.received:
            self.require(
                admit.received == arrival.received == admit.computed,
                f"{what}: {admit.received} tokens received",
            )
        self._attach(row, admit.pages[:hit])
        self._attach_new(row, admit.pages[hit:])
        self._fill(row, hit, what)
        arrival.received = 0  # a preempted request has to compute it again

    def _append(self, entry: TokensAt) -> None:
        what = f"tokens from {entry.start} for row {entry.row}"
        self.require(entry.row in self.rows, f"{what}, which is not live")
        row = self.rows[entry.row]
        self.require(
            row.computed <= entry.start <= len(row.tokens),
            f"{what}: {row.computed} computed, {len(row.tokens)} known",
        )
        self.require(bool(entry.token_ids), f"{what}: none")
        row.tokens[entry.start :] = entry.token_ids
        row.drafts = []

    def _fill(self, row: Row, hit: int, what: str) -> None:
        """The first `hit` pages must hold KV of this very prefix; with none, it is received now."""
        attended, size = row.start, self.page_size
        for position in range(row.computed):
            slot = slot_of(attended, row.tokens[position], position)
            page = row.table[position // size]
            if position < hit * size:
                found = self.kv[page][position % size]
                self.require(
                    found is not None, f"{what}: position {position} of a shared page was never written"
                )
                self.require(
                    found == slot, f"{what}: position {position} of a shared page holds another prefix"
                )
            else:
                self._received.append((page, position % size, slot))
            attended += slot

    def _attach(self, row: Row, pages: list[int]) -> None:
        self.require(all(0 <= page < self.num_pages for page in pages), f"{row.rid}: page ids {pages}")
        row.table += pages
        self._hold(pages, 1)

    def _attach_new(self, row: Row, pages: list[int]) -> None:
        """Pages to write to: nobody else's."""
        self._attach(row, pages)
        self._new += [(row, page) for page in pages]

    def _settle_new_pages(self, shared: set[int]) -> None:
        """Once a plan's tables are final, wipe its new pages, so that what they held before can't be used."""
        for row, page in self._new:
            self.require(
                self.holders[page] == 1, f"{row.rid}: new page {page} is in another row's page table"
            )
            self.require(page not in shared, f"{row.rid}: new page {page} belongs to the prefix tree")
            self.kv[page] = [None] * self.page_size
        for page, offset, slot in self._received:
            self.kv[page][offset] = slot
        self._new.clear()
        self._received.clear()

    def _change_table(self, change: PagesAt) -> None:
        self.require(change.row in self.rows, f"new pages for row {change.row}, which is not live")
        row = self.rows[change.row]
        start, have = change.start, len(row.table)
        self.require(0 <= start <= have, f"{row.rid}: pages from entry {start}, the page table has {have}")
        swapped = change.pages[: have - start]
        for index, page in enumerate(swapped, start):
            old, size = row.table[index], self.page_size
            self.require(
                (index + 1) * size <= row.computed, f"{row.rid}: entry {index} swapped while being written"
            )
            self.require(None not in self.kv[page], f"{row.rid}: entry {index} swapped for an unwritten page")
            self.require(
                self.kv[page] == self.kv[old], f"{row.rid}: entry {index} swapped for a page that differs"
            )
            row.table[index] = page
            self._hold([old], -1)
            self._hold([page], 1)
        self._attach_new(row, change.pages[have - start :])

    # ------------------------------------------------------------------ compute
    def _run(self, step: RowStep, shared: set[int], step_fails: bool) -> Computed:
        self.require(step.row in self.rows, f"row {step.row} runs without an admit")
        row, size = self.rows[step.row], self.page_size
        first, base = row.computed, step.q_len - step.num_drafts
        what = f"{row.rid} at {first}+{step.q_len}"
        self.require(
            base >= 1 and step.num_drafts >= 0, f"{what}: {base} tokens before {step.num_drafts} drafts"
        )
        self.require(
            step.num_drafts <= len(row.drafts), f"{what}: {step.num_drafts} drafts, {len(row.drafts)} exist"
        )
        self.require(first + base <= len(row.tokens), f"{what}: the row has {len(row.tokens)} tokens")
        whole = first + base == len(row.tokens)
        self.require(
            step.samples == whole, f"{what}: samples={step.samples}, the row has {len(row.tokens)} tokens"
        )
        self.require(step.samples or step.num_drafts == 0, f"{what}: drafts without sampling")
        end = first + step.q_len
        self.require(end <= self.max_context, f"{what}: beyond the context of {self.max_context}")
        self.require(
            end <= len(row.table) * size, f"{what}: the page table holds {len(row.table) * size} tokens"
        )
        if first < row.prompt_len:
            self.computed_prompt_tokens += min(end, row.prompt_len) - first
        for page in row.table[first // size : -(-end // size)]:
            self.require(page not in shared, f"{what}: writes to page {page}, which the prefix tree shares")
            self.require(self.holders[page] == 1, f"{what}: writes to page {page}, which another row reads")
        tokens = row.tokens[first : first + base] + row.drafts[: step.num_drafts]
        attended = row.start + self._read(row, first)
        fails = row.steps == row.arrival.fails_at or step_fails
        row.broken = row.broken or fails
        states: list[int] = []
        for position, token in enumerate(tokens, first):
            slot = slot_of(attended, token, position)
            self.kv[row.table[position // size]][position % size] = None if fails else slot
            attended += slot
            states.append(attended)
        return Computed(row, step, tokens, first, states)

    def _read(self, row: Row, count: int) -> int:
        """Attend to the first `count` positions, through the page table."""
        slots: list[int | None] = []
        for page in row.table[: -(-count // self.page_size)]:
            slots += self.kv[page]
        total = 0
        try:
            total = sum(slots[:count])  # type: ignore[arg-type]
        except TypeError:
            self.require(row.broken, f"{row.rid}: reads unwritten KV at {slots.index(None)} of {count}")
        return total

    # ------------------------------------------------------------------ sample
    def _sample(self, run: Computed, choices: dict[int, frozenset[int]]) -> RowOutput:
        row, step = run.row, run.step
        fails = row.steps == row.arrival.fails_at
        row.steps += 1
        prompt_logprobs = self._prompt_logprobs(run)
        row.drafts = []
        if row.pooling is not None:
            row.states += run.attended
        if not step.samples:
            row.computed += step.q_len
            return RowOutput([], error="broken") if fails else RowOutput([], prompt_logprobs=prompt_logprobs)
        base = step.q_len - step.num_drafts
        out: list[int] = []
        logprobs: list[TokenLogprobs] = []
        num_out = len(row.tokens) - row.prompt_len
        for i in range(step.num_drafts + 1):
            attended = run.attended[base - 1 + i]
            token = row.choose(attended, num_out + i, choices.get(step.row))
            out.append(token)
            if row.wanted is not None:
                logprobs.append(token_logprobs(attended, token, row.wanted))
            if i < step.num_drafts and token != run.tokens[base + i]:
                break
        row.tokens += out
        row.computed += base + len(out) - 1
        attended = run.attended[base + len(out) - 2]
        row.drafts = draft(attended, row.tokens, row.choose, num_out + len(out), self.num_drafts)
        if fails:
            return RowOutput([], error="broken")
        vector = b"" if row.pooling is None else pooled(row.states, row.pooling)
        return RowOutput(out, logprobs if row.wanted is not None else None, prompt_logprobs, vector)

    def _prompt_logprobs(self, run: Computed) -> list[TokenLogprobs] | None:
        """Entries for the prompt positions whose predecessor was computed in this step."""
        row = run.row
        if row.report_from is None or row.wanted is None:
            return None
        start = max(row.report_from, run.first + 1)
        end = min(row.prompt_len, run.first + run.step.q_len + 1)
        return [
            token_logprobs(run.attended[position - 1 - run.first], row.tokens[position], row.wanted)
            for position in range(start, end)
        ] or None
