"""What the system is told of memory, as it says itself."""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trunkline.attention.backend import KVPool
from trunkline.kernels import pages
from trunkline.kernels.ops import PagedShape
from trunkline.kernels.pages import LARGE_PAGES, NOT_NEEDED, Populating, advise, wait_until_populated

SMAPS = Path("/proc/self/smaps")
populates = pytest.mark.skipif(
    not advise(torch.empty(1 << 20, dtype=torch.uint8), pages._POPULATE), reason="the system can't populate"
)
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


def resident(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's whole pages that are in memory, by mincore(2)."""
    page = mmap.PAGESIZE
    begin = -(-tensor.data_ptr() // page) * page
    count = (tensor.data_ptr() + tensor.nbytes - begin) // page
    states = (ctypes.c_ubyte * count)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(begin), ctypes.c_size_t(count * page), states) == 0
    return page * sum(state & 1 for state in states)


@pytest.fixture(autouse=True)
def no_other_pool() -> None:
    """Pools of earlier tests have what they want."""
    wait_until_populated()


def fresh(pages: int) -> torch.Tensor:
    """A pool of 2 layers and pages of 64 KiB, of memory that the system has not provided yet."""
    return torch.empty(2, pages, 1 << 15, dtype=torch.uint8)


@populates
def test_memory_is_there_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_AHEAD", 1 << 24)  # 256 pages
    monkeypatch.setattr(pages, "_IDLE", 0.0)
    pool = fresh(2048)
    pool[:, 100] = 7
    assert resident(pool) < pool.nbytes // 8
    ahead = Populating(pool)
    for page, expected in ((-1, 256), (10, 256), (400, 657), (500, 657), (2047, 2048)):
        ahead.reach(page)
        wait_until_populated()
        for layer in pool.unbind(0):
            cut = 1 << 16  # the system's pages that two pieces share
            assert resident(layer[:expected]) >= expected * (1 << 15) - cut
            assert resident(layer[expected + 64 :]) < 1 << 22  # one large page at most
    assert int(pool.sum(dtype=torch.int64)) == 2 * 7 << 15


@populates
def test_steps_are_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_AHEAD", 1 << 24)
    pool = fresh(2048)
    ahead = Populating(pool)
    wait_until_populated()
    now, naps = [100.0], []

    def sleep(seconds: float) -> None:
        naps.append((seconds, resident(pool)))
        now[0] += seconds

    clock = SimpleNamespace(sleep=sleep, monotonic=lambda: now[0], perf_counter=time.perf_counter)
    monkeypatch.setattr(pages, "time", clock)
    ahead.reach(1000)
    wait_until_populated()
    assert naps[0][0] == 1.0 and naps[0][1] < 1 << 25  # a second without a step, then on
    assert resident(pool) > 1 << 26


def test_nothing_is_populated_for_a_pool_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, asleep, gone = [], threading.Event(), threading.Event()

    def sleep(_: float) -> None:
        asleep.set()
        assert gone.wait(10)

    clock = SimpleNamespace(sleep=sleep, monotonic=time.monotonic, perf_counter=time.perf_counter)
    monkeypatch.setattr(pages, "time", clock)
    monkeypatch.setattr(pages, "advise", lambda part, advice: not calls.append(part.numel()))
    pool = fresh(2048)
    Populating(pool)
    assert asleep.wait(10)
    del pool
    gone.set()
    wait_until_populated()
    assert calls == [1 << 22] * 2  # a piece, of both layers


def test_a_system_that_cannot_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(pages, "advise", lambda part, advice: bool(calls.append(part.numel())))
    pool = fresh(2048)
    Populating(pool)
    wait_until_populated()
    assert len(calls) == 1


@populates
def test_a_pool_is_populated() -> None:
    pool = KVPool(2, PagedShape(2, 2, 64, 16, 65_536), torch.bfloat16, torch.device("cpu"))
    wait_until_populated()
    assert resident(pool.data) > pool.nbytes - (1 << 20)


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
