"""Paged attention against a float64 oracle, and to the bit against itself under every way to batch it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from trunkline.kernels import ref
from trunkline.kernels.ops import Kernels, PagedShape, pool_size

# (query heads, kv heads, head size): one kv head, odd groups, many heads, odd sizes
HEADS = [(4, 2, 64), (7, 1, 16), (6, 6, 10), (8, 1, 32), (14, 2, 64), (1, 1, 8), (9, 3, 40)]


@dataclass
class Pool:
    """A KV pool whose unused slots are poisoned, and random page tables into it."""

    heads: tuple[int, int, int]
    page_size: int
    num_pages: int
    seed: int = 0
    dtype: torch.dtype = torch.float32
    soft_cap: float = 0.0
    scale: float | None = None
    data: Tensor = field(init=False)
    free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        query, kv, dim = self.heads
        slots = self.page_size * self.num_pages
        self.shape = PagedShape(query, kv, dim, self.page_size, slots, self.scale, self.soft_cap)
        poison = -1 if self.dtype == torch.int8 else float("nan")  # two bytes of it are a NaN for scale
        self.data = torch.full(pool_size(self.shape, self.dtype), poison, dtype=self.dtype)
        self.data[-1] = 0
        self.free = np.random.default_rng(self.seed).permutation(self.num_pages).tolist()

    def place(self, kv: Tensor) -> list[int]:
        """Write the KV [n, 2, K, D] of positions 0.. to pages of its own; returns the pages."""
        pages = [self.free.pop() for _ in range(-(-len(kv) // self.page_size))]
        positions = torch.arange(len(kv))
        slots = torch.tensor(pages)[positions // self.page_size] * self.page_size + positions % self.page_size
        ref.store_kv(self.data, slots, kv)
        return pages


def attend(
    kernels: Kernels,
    pool: Pool,
    window: int | None,
    parts: list[tuple[Tensor, int, list[int]]],
    tree_mask: Tensor | None = None,
) -> list[Tensor]:
    """One call for several requests: each (q of its last tokens, KV length, pages)."""
    q_start = torch.tensor(np.cumsum([0, *(len(q) for q, _, _ in parts)]), dtype=torch.int32)
    lengths = torch.tensor([length for _, length, _ in parts], dtype=torch.int32)
    table = torch.zeros(len(parts), max(len(pages) for _, _, pages in parts), dtype=torch.int32)
    for row, (_, _, pages) in enumerate(parts):
        table[row, : len(pages)] = torch.tensor(pages)
    plan = kernels.plan_attention(q_start, lengths, table, window, pool.shape, tree_mask)
    out = kernels.attention(torch.cat([q for q, _, _ in parts]), pool.data, plan)
    return list(out.split([len(q) for q, _, _ in parts]))


def oracle(
    q: Tensor, kv: Tensor, first: int, window: int | None, soft_cap: float = 0.0, scale: float | None = None
) -> Tensor:
    """Attention of queries at positions first.. over kv, in float64, the obvious way."""
    group = q.shape[1] // kv.shape[2]
    keys, values = (kv[:, i].double().repeat_interleave(group, 1) for i in (0, 1))
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * (scale or q.shape[-1] ** -0.5)
    if soft_cap:
        scores = soft_cap * (scores / soft_cap).tanh()
    query, key = torch.arange(first, first + len(q))[:, None], torch.arange(len(kv))
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), values)


def sequence(heads: tuple[int, int, int], length: int, seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    query, kv, dim = heads
    return torch.randn(length, query, dim) * 2, torch.randn(length, 2, kv, dim)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("window", [None, 1, 40, 700])
def test_equals_the_oracle(kernels: Kernels, heads: tuple[int, int, int], window: int | None) -> None:
    pool = Pool(heads, page_size=4, num_pages=700)
    parts, expected = [], []
    for seed, (length, q_len) in enumerate([(1, 1), (130, 130), (1300, 75), (513, 1), (127, 3), (640, 131)]):
        q, kv = sequence(heads, length, seed)
        parts.append((q[-q_len:], length, pool.place(kv)))
        expected.append(oracle(q[-q_len:], kv, length - q_len, window))
    for found, wanted in zip(attend(kernels, pool, window, parts), expected, strict=True):
        assert float((found.double() - wanted).norm() / wanted.norm()) < 2e-6


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("window", [None, 200])
def test_no_batch_chunk_page_or_thread_changes_a_bit(
    kernels: Kernels, heads: tuple[int, int, int], window: int | None, threads: int
) -> None:
    length = 1100
    q, kv = sequence(heads, length, 5)
    torch.set_num_threads(1)
    reference = Pool(heads, page_size=16, num_pages=80)
    (whole,) = attend(kernels, reference, window, [(q, length, reference.place(kv))])
    torch.set_num_threads(threads)
    rng = np.random.default_rng(7)
    for page_size in (1, 12):
        pool = Pool(heads, page_size, num_pages=5000 // page_size, seed=page_size)
        pages = pool.place(kv)
        others = []
        for seed, (other_len, q_len) in enumerate([(900, 1), (40, 40), (520, 2)]):
            other_q, other_kv = sequence(heads, other_len, seed)
            others.append((other_q[-q_len:], other_len, pool.place(other_kv)))
        done = 0
        while done < length:
            size = min(int(rng.choice([1, 1, 2, 3, 7, 64, 300])), length - done)
            mine = (q[done : done + size], done + size, pages)
            parts = [mine, *others[: int(rng.integers(0, 4))]]
            at = int(rng.integers(0, len(parts)))
            parts[0], parts[at] = parts[at], parts[0]
            assert torch.equal(attend(kernels, pool, window, parts)[at], whole[done : done + size]), (
                done,
                size,
            )
            done += size


def test_many_decoding_requests_equal_each_alone(kernels: Kernels, threads: int) -> None:
    heads = (4, 2, 32)
    pool = Pool(heads, page_size=8, num_pages=4000)
    parts = []
    for seed, length in enumerate([3, 128, 129, 500, 512, 513, 1025, 2048, *range(600, 640)]):
        q, kv = sequence(heads, length, seed)
        parts.append((q[-1:], length, pool.place(kv)))
    together = attend(kernels, pool, None, parts)
    for part, found in zip(parts, together, strict=True):
        assert torch.equal(attend(kernels, pool, None, [part])[0], found)


def test_masks_that_are_not_kept_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: Kernels = ref
    heads = (4, 2, 16)
    pool = Pool(heads, page_size=16, num_pages=100)
    q, kv = sequence(heads, 1200, 3)
    part = (q, 1200, pool.place(kv))
    (kept,) = attend(kernels, pool, 300, [part])
    monkeypatch.setattr("trunkline.kernels.ref.paged_attention._KEPT_MASKS", 0)
    monkeypatch.setattr("trunkline.kernels.ref.paged_attention._CALL_MASK", 1 << 14)
    assert torch.equal(attend(kernels, pool, 300, [part])[0], kept)


def test_a_poisoned_request_spoils_only_itself(kernels: Kernels) -> None:
    heads = (4, 2, 16)
    pool = Pool(heads, page_size=4, num_pages=100)
    q, kv = sequence(heads, 100, 1)
    bad = kv.clone()
    bad[50, 1, 0, 0] = float("nan")
    good, spoiled = attend(
        kernels, pool, None, [(q[-1:], 100, pool.place(kv)), (q[-1:], 100, pool.place(bad))]
    )
    assert good.isfinite().all()
    assert not spoiled.isfinite().all()


@pytest.mark.parametrize("heads", [(4, 2, 64), (6, 2, 96), (16, 1, 32), (3, 3, 40), (2, 1, 128)], ids=str)
@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("page_size", [1, 7, 16, 48])
def test_few_rows_have_the_bits_of_many(
    native_kernels: Kernels, heads: tuple[int, int, int], window: int | None, page_size: int
) -> None:
    """Few rows take bfloat16 keys where they lie, many pack them first: also subnormal and huge numbers."""
    length = 330
    q, kv = sequence(heads, length, page_size)
    rare = torch.rand(kv.shape)
    kv = torch.where(rare < 0.02, kv * 1e-39, torch.where(rare > 0.99, kv * 1e3, kv))
    q = torch.where(torch.rand(q.shape) < 0.02, q * 1e-39, q).bfloat16()
    kv[40, 0, :, 1], kv[63, 1, :, 2] = float("inf"), float("-inf")  # 63: a step ends with it
    kv[250, 0, :, 3], kv[301, 1, :, 3] = float("nan"), float("inf")  # later tokens see these, within a window
    soft_cap = 5.0 * (window == 90)
    pool = Pool(heads, page_size, 700 // page_size, page_size, dtype=torch.bfloat16, soft_cap=soft_cap)
    pages = pool.place(kv)
    (whole,) = attend(native_kernels, pool, window, [(q, length, pages)])
    assert bool(whole[:40].isfinite().all()) and not bool(whole.isfinite().all())
    done = 0
    for size in (1, 2, 3, 1, 5, 1) * 100:
        size = min(size, length - done)
        if size == 0:
            break
        (part,) = attend(native_kernels, pool, window, [(q[done : done + size], done + size, pages)])
        same = part.view(torch.int16) == whole[done : done + size].view(torch.int16)
        assert bool((same | (part.isnan() & whole[done : done + size].isnan())).all()), (done, size)
        done += size
