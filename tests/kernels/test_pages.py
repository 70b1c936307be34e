"""What the system is told of memory, as it says itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trunkline.attention.backend import KVPool
from trunkline.kernels.ops import PagedShape
from trunkline.kernels.pages import LARGE_PAGES, NOT_NEEDED, advise

SMAPS = Path("/proc/self/smaps")
large = pytest.mark.skipif(
    LARGE_PAGES is None or not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no large pages"
)


def flags_at(address: int) -> list[str]:
    """Flags of the mapping that holds an address: `hg` where large pages are wanted."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        words = line.split()
        if "-" in words[0] and ":" not in words[0]:
            begin, end = (int(bound, 16) for bound in words[0].split("-"))
            inside = begin <= address < end
        elif inside and words[0] == "VmFlags:":
            return words[1:]
    raise AssertionError(f"no mapping holds {address:#x}")


@large
def test_a_pool_wants_large_pages() -> None:
    pool = KVPool(2, PagedShape(2, 2, 64, 16, 65_536), torch.bfloat16, torch.device("cpu"))
    assert "hg" in flags_at(pool.data.data_ptr() + pool.nbytes // 2)
    assert not pool.data[:, -1].any()


def test_advice_is_for_whole_pages_of_the_tensor_alone() -> None:
    whole = torch.ones(1 << 22, dtype=torch.uint8)
    advise(whole[100:-100], NOT_NEEDED)
    assert whole[:100].all() and whole[-100:].all()
    assert not whole[8192:-8192].any()  # the system took the pages: fresh ones are zeros
    advise(whole[100:200], NOT_NEEDED)  # no whole page
    advise(whole, None)
    assert whole[:100].all()
