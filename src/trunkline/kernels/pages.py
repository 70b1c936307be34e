"""What the operating system is told about a tensor's memory."""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
import weakref

from torch import Tensor

# Of 2 MB: fewer page faults when memory is first written, and fewer address look-ups whenever it is read.
LARGE_PAGES: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
NOT_NEEDED = mmap.MADV_DONTNEED
# MADV_POPULATE_WRITE of Linux 5.14: as if each page had been written to, which changes nothing.
_POPULATE = 23
_PIECE = 1 << 23  # bytes of one such call: a few milliseconds
_AHEAD = 1 << 30  # bytes
_IDLE = 1.0  # seconds without a step
_POPULATING = "populate"  # what the threads are called


def advise(tensor: Tensor, advice: int | None) -> bool:
    """madvise(2) of the pages that lie wholly in a tensor of the CPU: a wish. False: it was refused."""
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (tensor.data_ptr() + tensor.nbytes - begin) // mmap.PAGESIZE * mmap.PAGESIZE
    if size <= 0 or advice is None:
        return True
    return ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), advice) == 0


class Populating:
    """Has the system provide a pool's memory while no step runs, 1 GiB ahead of its use.

    A step that is the first to write to memory waits for the system: on a virtual machine up to 140 ms for
    the KV of 512 tokens. A thread works while there is something to do, half of the time; it ends early if
    the pool goes or the system can't. One thread calls `reach`.
    """

    def __init__(self, pool: Tensor) -> None:
        """`pool` [layers, pages, ...] on the CPU, dense."""
        self._pool = weakref.ref(pool)
        self._pages = pool.shape[1]
        self._of_page = pool.nbytes // pool.shape[1]
        self._done = self._wanted = 0  # pages
        self._thread: threading.Thread | None = None
        self._last_step = -_IDLE
        self._want(-1)

    def reach(self, page: int) -> None:
        """A step begins, which may be the first to write to pages up to `page`."""
        self._last_step = time.monotonic()
        self._want(page)

    def _want(self, page: int) -> None:
        ahead = _AHEAD // self._of_page
        wanted = min(page + 1 + ahead, self._pages)
        if wanted < min(self._wanted + ahead // 2 + 1, self._pages) or wanted == self._wanted:
            return
        self._wanted = wanted
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._work, name=_POPULATING, daemon=True)
            self._thread.start()

    def _work(self) -> None:
        step = max(1, _PIECE // self._of_page)
        while self._done < self._wanted:
            if (rest := self._last_step + _IDLE - time.monotonic()) > 0:
                time.sleep(rest)  # steps need the cores: what they touch now they have to wait for
                continue
            started = time.perf_counter()
            pool = self._pool()
            if pool is None or not all(
                advise(layer[self._done : self._done + step], _POPULATE) for layer in pool.unbind(0)
            ):
                return
            del pool
            self._done += step
            time.sleep(time.perf_counter() - started)


def wait_until_populated() -> None:
    """Wait for all threads of `Populating`."""
    for thread in threading.enumerate():
        if thread.name == _POPULATING:
            thread.join()
