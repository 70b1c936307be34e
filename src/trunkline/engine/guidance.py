"""Grammars beside the loop: compiled in other threads, and masks filled in parallel while a step runs."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from trunkline.grammar.protocol import Grammar
from trunkline.messages import AddRequest
from trunkline.scheduler.guide import Guide, failure
from trunkline.scheduler.plan import Masks
from trunkline.scheduler.request import Request
from trunkline.scheduler.scheduler import GuidedRow
from trunkline.types import FinishReason, GrammarSpec, RequestError

# Seconds. A mask takes 3 us or 40, as its grammar is; waking threads 10 to 150, copying what they computed 3.
# The first masks of a step find nothing in the caches of the processor.
WORTH_THREADS = 300e-6
COPY = 5e-6
COLD = 30e-6


class Compiler(Protocol):
    """Compiles in threads of its own, within bounds of time and memory, and keeps what it compiled."""

    def submit(self, spec: GrammarSpec) -> Future[Grammar]:
        """The compiled grammar, or a GrammarError as the future's exception. Returns at once; equal specs may
        share a future."""

    def warm(self) -> None:
        """Make ready for the first grammar. Returns at once."""

    def close(self) -> None: ...


class LateCompiler:
    """Makes a compiler when the first grammar comes, or before by `warm`, in a thread: reading a vocabulary
    takes a second."""

    def __init__(self, make: Callable[[], Compiler]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(1, "trunkline-grammars")
        self._made: Future[Compiler] | None = None

    def submit(self, spec: GrammarSpec) -> Future[Grammar]:
        if self._made is None:
            self._made = self._thread.submit(self._make)
        found: Future[Grammar] = Future()
        self._made.add_done_callback(lambda made: _ask(made, spec, found))
        return found

    def warm(self) -> None:
        if self._made is None:
            self._made = self._thread.submit(self._make)
            self._made.add_done_callback(_warm)

    def close(self) -> None:
        self._thread.shutdown()
        if self._made is not None and self._made.exception() is None:
            self._made.result().close()


def _warm(made: Future[Compiler]) -> None:
    if made.exception() is None:  # else the first grammar's sender is told
        made.result().warm()


def _ask(made: Future[Compiler], spec: GrammarSpec, found: Future[Grammar]) -> None:
    try:
        made.result().submit(spec).add_done_callback(lambda done: _pass_on(done, found))
    except Exception as error:
        found.set_exception(error)


def _pass_on(done: Future[Grammar], found: Future[Grammar]) -> None:
    error = done.exception()
    if error is None:
        found.set_result(done.result())
    else:
        found.set_exception(error)


class Guidance:
    """Makes the guides of requests, and the masks of steps. Used by the loop's thread alone; `wake` is called
    from others when there is news. Without a compiler, grammars are refused.

    `beside`: masks are filled while a step runs; else behind the forward pass, in the loop's thread. On a CPU
    whose cores all compute, another thread would hold up all of them. Both leave slow ones to the threads of
    the grammar backend.
    """

    def __init__(
        self,
        compiler: Compiler | None = None,
        eos_ids: Iterable[int] = (),
        vocab_size: int = 0,
        beside: bool = False,
    ) -> None:
        self.wake: Callable[[], None] = _nothing
        self.counters = {"grammars": 0, "grammars_refused": 0}
        self._compiler = compiler
        self._eos_ids = tuple(eos_ids)
        self._words = -(-vocab_size // 32)
        self._done: queue.SimpleQueue[tuple[Request, Future[Grammar]]] = queue.SimpleQueue()
        self._thread = ThreadPoolExecutor(1, "trunkline-mask") if beside else None

    # ------------------------------------------------------------------ compiling
    def check(self, message: AddRequest) -> None:
        """Raises RequestError for a grammar where there is no backend."""
        if message.grammar is not None and self._compiler is None:
            raise RequestError(
                "structured output is off: the server runs with --grammar-backend none, or its model has no "
                "end-of-sequence token",
                code="no_grammar_backend",
                param="grammar",
            )

    def start(self, request: Request) -> None:
        """Compile a request's grammar, if it has one."""
        spec = request.message.grammar
        if spec is None or self._compiler is None:
            return
        self.counters["grammars"] += 1
        self._compiler.submit(spec).add_done_callback(lambda done: self._announce(request, done))

    def _announce(self, request: Request, done: Future[Grammar]) -> None:
        self._done.put((request, done))
        self.wake()

    @property
    def has_news(self) -> bool:
        return not self._done.empty()

    def news(self) -> Iterable[tuple[Request, Guide | FinishReason]]:
        """Compilations that have ended: a guide at its start, or why there is none. Their requests may have
        left meanwhile."""
        while self.has_news:
            request, done = self._done.get()
            yield request, self._guide(request, done)

    def _guide(self, request: Request, done: Future[Grammar]) -> Guide | FinishReason:
        try:
            matcher = done.result().matcher()
        except Exception as error:
            self.counters["grammars_refused"] += 1
            return failure(error)
        return Guide(matcher, self._eos_ids, request.message.thinking)

    def warm(self) -> None:
        """Load what the first grammar needs. Returns at once; holds up the loop for parts of a second."""
        if self._compiler is not None:
            self._compiler.warm()

    # ------------------------------------------------------------------ masks
    def begin_masks(self, rows: Sequence[GuidedRow]) -> StepMasks:
        """Start on the masks of one step with the rows whose tokens are known already."""
        masks = StepMasks(self._thread, self._words)
        if self._thread is not None:
            masks.add(rows)
        return masks

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
        if self._compiler is not None:
            self._compiler.close()


class StepMasks:
    """The masks of one step in the making. `failed`, after `result`: requests whose grammar broke down; they
    go unmasked and must be ended."""

    def __init__(self, thread: ThreadPoolExecutor | None, words: int) -> None:
        self.failed: list[tuple[Request, FinishReason]] = []
        self._thread = thread
        self._words = words
        self._parts: list[
            tuple[list[GuidedRow], npt.NDArray[np.int32], Callable[[], list[Exception | None]]]
        ] = []
        self._seen: set[int] = set()

    def add(self, rows: Iterable[GuidedRow]) -> None:
        """Start on the masks of rows that were not added before."""
        fresh = [row for row in rows if row.at not in self._seen]
        self._seen.update(row.at for row in fresh)
        if fresh:
            words = np.empty((len(fresh), self._words), np.int32)
            fill = partial(fill_masks, [(row.guide, row.banned) for row in fresh], words)
            self._parts.append(
                (fresh, words, fill if self._thread is None else self._thread.submit(fill).result)
            )

    def result(self) -> Masks | None:
        """Wait for all. None for a step without constrained rows."""
        good: list[tuple[int, npt.NDArray[np.int32]]] = []
        for rows, words, errors in self._parts:
            for row, mask, error in zip(rows, words, errors(), strict=True):
                if error is None:
                    good.append((row.at, mask))
                else:
                    self.failed.append((row.request, failure(error)))
        if not good:
            return None
        good.sort(key=lambda entry: entry[0])
        return Masks([at for at, _ in good], np.stack([mask for _, mask in good]))


def fill_masks(
    rows: Sequence[tuple[Guide, frozenset[int]]], words: npt.NDArray[np.int32]
) -> list[Exception | None]:
    """Fill one row of `words` (`plan.Masks`) for each guide and what is banned there. Returns what went wrong
    with each; the others are not affected.

    One after the other, until what is left looks slow enough that threads compute it first, at once.
    """
    errors: list[Exception | None] = []
    begun, alone = time.perf_counter(), True
    for done, ((guide, banned), mask) in enumerate(zip(rows, words, strict=True)):
        slow = time.perf_counter() - begun - done * COPY - COLD
        if alone and done and slow * (len(rows) - done) > WORTH_THREADS * done:
            alone = False
            matchers = [matcher for later, _ in rows[done:] if (matcher := later.asked) is not None]
            if len(matchers) > 1:
                matchers[0].prepare(matchers)
        try:
            guide.fill_mask(mask, banned)
        except Exception as error:
            errors.append(error)
        else:
            errors.append(None)
    return errors


def _nothing() -> None:
    pass
