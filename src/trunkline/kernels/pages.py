"""What the operating system is told about a tensor's memory."""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

# Of 2 MB: fewer page faults when memory is first written, and fewer address look-ups whenever it is read.
LARGE_PAGES: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
NOT_NEEDED = mmap.MADV_DONTNEED


def advise(tensor: Tensor, advice: int | None) -> None:
    """madvise(2) of the pages that lie wholly in a tensor of the CPU: a wish, which the system may refuse."""
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (tensor.data_ptr() + tensor.nbytes - begin) // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0 and advice is not None:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), advice)
