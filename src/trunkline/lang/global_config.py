"""What all programs of a process share: the default backend, the event loop that runs them, a few switches.

The one process-wide object of Trunkline: `set_default_backend` is part of the language.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Coroutine
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from trunkline.lang.executor import Run

T = TypeVar("T")


class GlobalConfig:
    """Switches are plain attributes; assign to change them."""

    __slots__ = (
        "_lock", "_loop", "default_backend", "enable_precache_with_tracing", "scope",
        "skip_special_tokens_in_output", "spaces_between_special_tokens_in_out", "verbosity",
    )  # fmt: skip  # another name is a slip

    def __init__(self) -> None:
        self.verbosity = 0  # 2 prints the text of each program that ends
        self.default_backend: Any = None
        self.skip_special_tokens_in_output = True
        self.spaces_between_special_tokens_in_out = True
        self.enable_precache_with_tracing = True  # run_batch caches its rows' common prefix first
        self.scope: ContextVar[Run | None] = ContextVar("scope", default=None)  # whose function runs here
        self._lock = threading.Lock()
        self._loop: tuple[int, asyncio.AbstractEventLoop] | None = None

    @property
    def enable_parallel_encoding(self) -> bool:
        """False: branches that are joined with concate_and_append become one text. Raises ValueError for
        True."""
        return False

    @enable_parallel_encoding.setter
    def enable_parallel_encoding(self, wanted: bool) -> None:
        if wanted:
            raise ValueError("parallel encoding is not supported: joined branches are read as one text")

    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of all states, in a daemon thread that starts with the first program."""
        with self._lock:
            # A forked child has no threads of its parent.
            if self._loop is None or self._loop[0] != os.getpid():
                loop = asyncio.new_event_loop()
                threading.Thread(target=loop.run_forever, name="trunkline-programs", daemon=True).start()
                self._loop = os.getpid(), loop
            return self._loop[1]

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine, run on the loop; called from any other thread."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop())
        try:
            return future.result()
        except BaseException:  # such as KeyboardInterrupt here: the work must not go on there
            future.cancel()
            raise

    async def each(self, pieces: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """What a generator yields that runs on the loop, for any other loop."""
        try:
            while True:
                piece = asyncio.run_coroutine_threadsafe(anext(pieces, None), self.loop())
                found = await asyncio.wrap_future(piece)
                if found is None:
                    return
                yield found
        finally:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(pieces.aclose(), self.loop()))


global_config = GlobalConfig()
