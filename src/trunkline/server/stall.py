"""Notices when the server's own event loop stands still: then it answers no probe and streams nothing."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable

EXIT_CODE = 70  # EX_SOFTWARE: whatever runs the server should start it again

log = logging.getLogger(__name__)


def _end() -> None:
    """The engine core follows when its lifeline closes."""
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    os._exit(EXIT_CODE)


class StallWatch:
    """A thread that asks the loop for a sign of life. After `limit` seconds without one it writes the stacks
    of all threads down, and ends the process."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: float, end: Callable[[], None] = _end) -> None:
        self._loop = loop
        self._limit = limit
        self._end = end
        self._seen = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="trunkline-stall-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _beat(self) -> None:
        self._seen = time.monotonic()

    def _watch(self) -> None:
        interval = min(1.0, self._limit / 4)
        asked = time.monotonic()
        while not self._stopped.wait(interval):
            now = time.monotonic()
            if now - asked > self._limit:
                self._seen = now  # this thread stood still, too: the whole process was stopped
            asked = now
            self._loop.call_soon_threadsafe(self._beat)
            silent = now - self._seen
            if silent > self._limit:
                log.critical("the event loop stands still for %.0f s: ending", silent)
                self._end()
                return
