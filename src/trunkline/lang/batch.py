"""Many rows of one program: a bounded number at once, in an order that shares prefixes, results in input
order."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from trunkline.lang.global_config import global_config
from trunkline.lang.interpreter import ProgramState

Row = Mapping[str, Any]
log = logging.getLogger(__name__)


def run(
    rows: Sequence[Row],
    order: Sequence[str],
    start: Callable[[], ProgramState],
    enter: Callable[[ProgramState, Sequence[Any], Row], None],
    *,
    width: int,
    chunk: int,
    progress_bar: bool,
) -> Iterator[ProgramState]:
    """Finished states in the order of the rows. `enter` runs the function on what `start` gives. At most
    `width` rows are under way, no more than `chunk` are run ahead of the caller."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(total=len(rows), disable=not progress_bar) as bar:
        for first in range(0, len(rows), chunk):
            some = rows[first : first + chunk]
            states = [start() for _ in some]
            _run_chunk([(states[i], some[i]) for i in sorted_rows(some, order)], enter, width, bar.update)
            failed = [i for i, state in enumerate(states) if state.stream_executor.error is not None]
            if failed:
                error = states[failed[0]].stream_executor.error
                message = "%d of %d rows failed; the first is row %d: %r"
                log.warning(message, len(failed), len(some), first + failed[0], error)
            yield from states


def sorted_rows(rows: Sequence[Row], order: Sequence[str]) -> list[int]:
    """Positions of the rows, sorted by what they say, so that equal beginnings follow each other: the order
    of a walk through the tree of prompts, depth first. `order`: arguments, the one that the text uses first
    before others."""
    keys = [tuple(str(row.get(name, "")) for name in order) for row in rows]
    return sorted(range(len(rows)), key=keys.__getitem__)


def _run_chunk(
    work: Sequence[tuple[ProgramState, Row]],
    enter: Callable[..., None],
    width: int,
    update: Callable[[], Any],
) -> None:
    """A row takes a thread only while its function runs: one that reads no values on its way is done with it
    at once. Its place is free again when its state is finished."""
    places = threading.Semaphore(width)

    async def finish(executor: Any) -> None:
        await executor.until(lambda: executor.finished)
        update()
        places.release()

    with ThreadPoolExecutor(width, thread_name_prefix="trunkline-rows") as pool:
        try:
            for state, row in work:
                places.acquire()
                asyncio.run_coroutine_threadsafe(finish(state.stream_executor), global_config.loop())
                pool.submit(enter, state, (), row)
            for _ in range(width):
                places.acquire()
        except BaseException:  # such as KeyboardInterrupt: what has begun must not go on
            pool.shutdown(wait=False, cancel_futures=True)
            for state, _ in work:
                state.stream_executor.cancel()
            raise
