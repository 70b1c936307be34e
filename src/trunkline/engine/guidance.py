"""Grammars beside the loop: compiled in other threads, and masks filled in parallel while a step runs."""

from __future__ import annotations

import queue
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

MASK_THREADS = 4
ROWS_PER_TASK = 4  # masks that one task fills: waking a thread costs about as much as one of them


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

    `threads` fill masks while a step runs; none: the loop's thread does, behind the forward pass. On a CPU
    whose cores all compute, another thread would hold up all of them.
    """

    def __init__(
        self,
        compiler: Compiler | None = None,
        eos_ids: Iterable[int] = (),
        vocab_size: int = 0,
        threads: int = 0,
    ) -> None:
        self.wake: Callable[[], None] = _nothing
        self.counters = {"grammars": 0, "grammars_refused": 0}
        self._compiler = compiler
        self._eos_ids = tuple(eos_ids)
        self._words = -(-vocab_size // 32)
        self._done: queue.SimpleQueue[tuple[Request, Future[Grammar]]] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None
        if threads:
            self._threads = ThreadPoolExecutor(min(threads, MASK_THREADS), "trunkline-mask")

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
        masks = StepMasks(self._threads, self._words)
        if self._threads is not None:
            masks.add(rows)
        return masks

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        if self._compiler is not None:
            self._compiler.close()


class StepMasks:
    """The masks of one step in the making. `failed`, after `result`: requests whose grammar broke down; they
    go unmasked and must be ended."""

    def __init__(self, threads: ThreadPoolExecutor | None, words: int) -> None:
        self.failed: list[tuple[Request, FinishReason]] = []
        self._threads = threads
        self._words = words
        self._parts: list[
            tuple[list[GuidedRow], npt.NDArray[np.int32], Callable[[], list[Exception | None]]]
        ] = []
        self._seen: set[int] = set()

    def add(self, rows: Iterable[GuidedRow]) -> None:
        """Start on the masks of rows that were not added before."""
        fresh = [row for row in rows if row.at not in self._seen]
        self._seen.update(row.at for row in fresh)
        for low in range(0, len(fresh), ROWS_PER_TASK):
            part = fresh[low : low + ROWS_PER_TASK]
            words = np.empty((len(part), self._words), np.int32)
            fill = partial(_fill, part, words)
            self._parts.append(
                (part, words, fill if self._threads is None else self._threads.submit(fill).result)
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


def _fill(rows: Sequence[GuidedRow], words: npt.NDArray[np.int32]) -> list[Exception | None]:
    errors: list[Exception | None] = []
    for row, mask in zip(rows, words, strict=True):
        try:
            row.guide.fill_mask(mask, row.banned)
        except Exception as error:
            errors.append(error)
        else:
            errors.append(None)
    return errors


def _nothing() -> None:
    pass
