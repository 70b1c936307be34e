"""Requests whose pages begin alike: their keys are read once, and no bit differs from each request alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.test_attention import Pool, attend, sequence
from trunkline.kernels.cpu import native
from trunkline.kernels.cpu import ops as cpu
from trunkline.kernels.ops import Kernels, PagedShape

BLOCK = 128
Part = tuple[Tensor, int, list[int]]


def family(pool: Pool, rng: np.random.Generator, seed: int, q_lens: tuple[int, ...]) -> list[Part]:
    """Requests that leave each other's path at any page, as children of a random earlier one."""
    page = pool.page_size
    parts: list[Part] = []
    members: list[tuple[Tensor, list[int]]] = []
    for index in range(int(rng.integers(2, 9))):
        length = int(rng.integers(1, 700))
        q, kv = sequence(pool.heads, length, seed * 100 + index)
        pages: list[int] = []
        if members and rng.random() < 0.85:
            base_kv, base_pages = members[int(rng.integers(0, len(members)))]
            kept = int(rng.integers(0, min(len(base_kv), length - 1) // page + 1)) if length > 1 else 0
            kv = torch.cat([base_kv[: kept * page], kv[kept * page :]])
            pages = base_pages[:kept]
        pages = pages + pool.place(kv[len(pages) * page :])
        members.append((kv, pages))
        own = length - len(pages) * page  # at most what the last pages hold
        q_len = min(int(rng.choice(q_lens)), max(1, length - shared_tokens(parts, pages, page)))
        assert own <= 0 and q_len >= 1
        parts.append((q[-q_len:], length, pages))
    return parts


def shared_tokens(parts: list[Part], pages: list[int], page: int) -> int:
    """Tokens at the start of `pages` that another request has too: they can't be of this step."""
    most = 0
    for _, _, other in parts:
        same = 0
        while same < min(len(pages), len(other)) and pages[same] == other[same]:
            same += 1
        most = max(most, same * page)
    return most


@pytest.mark.parametrize("page_size", [1, 16, 48, 256])
@pytest.mark.parametrize("window", [None, 90, 400])
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "bfloat16 queries"])
def test_each_has_the_bits_that_it_has_alone(
    kernels: Kernels, page_size: int, window: int | None, form: str, threads: int
) -> None:
    torch.set_num_threads(threads)
    rng = np.random.default_rng([page_size, window or 0, len(form), threads])
    dtype = {"float32": torch.float32, "int8": torch.int8}.get(form, torch.bfloat16)
    for case, heads in enumerate([(4, 2, 64), (7, 1, 16), (6, 6, 10)]):
        pool = Pool(heads, page_size, 9000 // page_size, seed=case, dtype=dtype, soft_cap=3.0 * (case == 1))
        parts = family(pool, rng, case, (1, 1, 2, 20, 60))
        if form == "bfloat16 queries":
            parts = [(q.bfloat16(), length, pages) for q, length, pages in parts]
        together = attend(kernels, pool, window, parts)
        for index, part in enumerate(parts):
            assert torch.equal(attend(kernels, pool, window, [part])[0], together[index]), (case, index)


def test_trees_share_what_stands_before_them(kernels: Kernels, threads: int) -> None:
    torch.set_num_threads(threads)
    heads = (4, 2, 32)
    pool = Pool(heads, 16, 300)
    _, kv = sequence(heads, 512, 1)
    prefix = pool.place(kv)
    parts = []
    for index, length in enumerate([519, 519, 640, 519]):
        q, own = sequence(heads, length, 10 + index)
        parts.append((q[-7:], length, prefix + pool.place(own[512:])))
    mask = torch.zeros(28, 7, dtype=torch.bool)
    for row in range(28):
        mask[row, row % 7 % 2 : row % 7 + 1 : 2] = True
    for window in (None, 300):
        together = attend(kernels, pool, window, parts, mask)
        for index, part in enumerate(parts):
            alone = attend(kernels, pool, window, [part], mask[7 * index : 7 * index + 7])[0]
            assert torch.equal(alone, together[index])


def test_what_is_not_finite_spoils_only_those_that_see_it(native_kernels: Kernels) -> None:
    heads = (4, 2, 32)
    for place, window, spoiled in ((40, None, [True, True]), (200, 300, [True, False])):
        pool = Pool(heads, 16, 200)
        q, kv = sequence(heads, 700, 3)
        kv[place, 1, 0, 3] = float("inf")
        prefix = pool.place(kv[:384])
        parts = [(q[-1:], n, prefix + pool.place(kv[384:n])) for n in (450, 700)]
        found = attend(native_kernels, pool, window, parts)
        assert [not bool(out.isfinite().all()) for out in found] == spoiled


def test_keys_of_a_stem_come_from_one_request_s_pages(native_kernels: Kernels) -> None:
    """A plan keeps its page table: where another request's pages are exchanged later, only what it does not
    share with the first shows it."""
    heads = (4, 2, 32)
    pool = Pool(heads, 16, 200)
    q, kv = sequence(heads, 700, 3)
    _, other = sequence(heads, 256, 4)
    prefix, wrong = pool.place(kv[:256]), pool.place(other)
    own = [pool.place(kv[256:n]) for n in (300, 310)]
    table = torch.zeros(2, 20, dtype=torch.int32)
    for row, pages in enumerate(own):
        table[row, : 16 + len(pages)] = torch.tensor(prefix + pages)
    starts, lengths = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([300, 310], dtype=torch.int32)
    plan = native_kernels.plan_attention(starts, lengths, table, None, pool.shape)
    before = native_kernels.attention(q[:2], pool.data, plan)
    table[1, :16] = torch.tensor(wrong)
    assert torch.equal(native_kernels.attention(q[:2], pool.data, plan), before)
    table[1, 16:] = torch.tensor(wrong[:4])
    assert not torch.equal(native_kernels.attention(q[:2], pool.data, plan)[1], before[1])


def plan_of(
    rows: list[list[int]], lengths: list[int], q_lens: list[int], page_size: int
) -> native.AttentionPlan:
    table = torch.zeros(len(rows), max(len(r) for r in rows), dtype=torch.int32)
    for i, row in enumerate(rows):
        table[i, : len(row)] = torch.tensor(row)
    q_start = torch.tensor(np.cumsum([0, *q_lens]), dtype=torch.int32)
    shape = PagedShape(4, 2, 8, page_size, 20_000 * page_size)
    return cpu.plan_attention(q_start, torch.tensor(lengths, dtype=torch.int32), table, None, shape)


def test_stems_are_the_radix_tree_of_the_pages() -> None:
    block = [[8 * n + i for i in range(8)] for n in range(40)]  # a block is 8 pages of 16
    rows = [
        block[0] + block[1] + block[2] + [900],
        block[0] + block[1] + block[3] + [901],
        block[9] + [902],
        block[0] + block[1] + block[2] + block[4] + [903],
        block[0] + block[5][:4] + [904],
    ]
    lengths = [len(row) * 16 for row in rows]
    stems = plan_of(rows, lengths, [1] * 5, 16).stems()
    assert [(sorted(who), start, end) for who, start, end in stems] == [
        ([0, 1, 3, 4], 0, 1),
        ([0, 1, 3], 1, 2),
        ([0, 3], 2, 3),
    ]


def test_a_block_counts_only_where_it_is_whole_and_before_the_step() -> None:
    same = list(range(16))
    assert plan_of([[*same, 90], [*same, 91]], [257, 257], [1, 1], 16).stems() == [([0, 1], 0, 2)]
    assert plan_of([[*same, 90], [*same, 91]], [257, 257], [2, 1], 16).stems() == [([0, 1], 0, 1)]
    assert plan_of([same, [*same[:8], 91]], [127, 129], [1, 1], 16).stems() == []
    # 128 tokens of two heads to one of keys fill a tile: more than that stand alone
    long = [*same, *range(90, 98)]
    assert plan_of([long, [*same, 99]], [384, 257], [128, 1], 16).stems() == [([0, 1], 0, 2)]
    assert plan_of([[*long, 98], [*same, 99]], [385, 257], [129, 1], 16).stems() == []


@pytest.mark.parametrize("seed", range(30))
def test_stems_cover_what_pairs_have_in_common(seed: int) -> None:
    """A request's stems are a path: its blocks are those it shares with the one most like it."""
    rng = np.random.default_rng(seed)
    page = int(rng.choice([1, 16, 128, 300]))
    rows: list[list[int]] = []
    for index in range(int(rng.integers(2, 12))):
        base = rows[int(rng.integers(0, len(rows)))] if rows else []
        kept = base[: int(rng.integers(0, len(base) + 1))]
        rows.append([*kept, *range(1000 * index, 1000 * index + int(rng.integers(1, 1 + 900 // page)))])
    lengths = [len(row) * page for row in rows]
    stems = plan_of(rows, lengths, [1] * len(rows), page).stems()
    for who, start, end in stems:
        assert len(who) >= 2 and 0 <= start < end
        first = rows[who[0]][: -(-end * BLOCK // page)]
        assert all(rows[other][: len(first)] == first for other in who)
    for one, row in enumerate(rows):
        path = sorted((start, end) for who, start, end in stems if one in who)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(path)) and (not path or path[0][0] == 0)
        shared = 0
        for other, theirs in enumerate(rows):
            if other != one:
                same = next((i for i, (a, b) in enumerate(zip(row, theirs, strict=False)) if a != b), None)
                common = (min(len(row), len(theirs)) if same is None else same) * page
                shared = max(shared, min(common, lengths[one] - 1, lengths[other] - 1) // BLOCK)
        assert (path[-1][1] if path else 0) == shared
