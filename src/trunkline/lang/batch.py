"""Many rows of one program: a bounded number at once, in an order that shares prefixes, results in input
order."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from trunkline.lang.backends.backend import Backend
from trunkline.lang.global_config import global_config
from trunkline.lang.ir import Sampling
from trunkline.lang.state import ProgramState

if TYPE_CHECKING:
    from trunkline.lang.program import SglFunction

CHUNK = 200  # rows that an iterator runs ahead

Row = Mapping[str, Any]
log = logging.getLogger(__name__)


class Batch:
    """Runs of `program` on one backend with the same sampling parameters."""

    def __init__(self, program: SglFunction, backend: Backend, sampling: Sampling) -> None:
        self._program = program
        self._backend = backend
        self._sampling = sampling
        self._order = list(program.arg_names)  # arguments, the one that the text uses first before others

    def prepare(self, num_rows: int) -> None:
        """Trace the program: cache the prefix that all rows share, and learn the order of the arguments."""
        if num_rows < 2 or not global_config.enable_precache_with_tracing:
            return
        tracer = self._program.trace(backend=self._backend).stream_executor
        self._order = list(dict.fromkeys([*tracer.arguments(), *self._order]))
        self._program.cache_prefix(tracer, self._backend)

    def sorted(self, rows: Sequence[Row]) -> list[int]:
        """Positions of the rows, sorted by what they say, so that equal beginnings follow each other: the
        order of a walk through the tree of prompts, depth first."""
        keys = [tuple(str(row.get(name, "")) for name in self._order) for row in rows]
        return sorted(range(len(rows)), key=keys.__getitem__)

    def all(self, rows: Sequence[Row], num_threads: int | str, progress_bar: bool) -> list[ProgramState]:
        with _progress(progress_bar, len(rows)) as bar:
            states = self._run(rows, num_threads, bar)
        _report(states)
        return states

    def iterate(
        self, rows: Sequence[Row], num_threads: int | str, progress_bar: bool
    ) -> Iterator[ProgramState]:
        """States in order; keeps no more than a chunk of them."""
        with _progress(progress_bar, len(rows)) as bar:
            for first in range(0, len(rows), CHUNK):
                states = self._run(rows[first : first + CHUNK], num_threads, bar)
                _report(states)
                yield from states

    def _run(self, rows: Sequence[Row], num_threads: int | str, bar: Any) -> list[ProgramState]:
        """All states, finished. A row takes a thread only while its function runs: one that reads no values
        on its way is done with it at once. Its place is free again when its state is finished."""
        if not rows:
            return []
        width = max(96, 16 * (os.cpu_count() or 1)) if num_threads == "auto" else int(num_threads)
        width = max(1, min(width, len(rows)))
        places = threading.Semaphore(width)
        states = [self._program.start(self._backend, self._sampling) for _ in rows]

        def finished() -> None:
            bar.update()
            places.release()

        with ThreadPoolExecutor(width, thread_name_prefix="trunkline-rows") as pool:
            try:
                for i in self.sorted(rows):
                    places.acquire()
                    states[i].stream_executor.when_finished(finished)
                    pool.submit(self._program.quietly, states[i], (), rows[i])
                for _ in range(width):
                    places.acquire()
            except BaseException:  # such as KeyboardInterrupt: what has begun must not go on
                pool.shutdown(wait=False, cancel_futures=True)
                for state in states:
                    state.stream_executor.cancel()
                raise
        return states


def _report(states: Sequence[ProgramState]) -> None:
    failed = [i for i, state in enumerate(states) if state.stream_executor.error is not None]
    if failed:
        error = states[failed[0]].stream_executor.error
        log.warning(
            "%d of %d rows failed; the first is row %d: %r", len(failed), len(states), failed[0], error
        )


def _progress(shown: bool, total: int) -> Any:
    from tqdm import tqdm  # type: ignore[import-untyped]

    return tqdm(total=total, disable=not shown)
