"""Attention over keys and values in int8, with capped scores, of draft trees: each against the float64
oracle, and to the bit against itself however it is batched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.test_attention import HEADS, Pool, attend, oracle, sequence
from trunkline.kernels import ref
from trunkline.kernels.ops import Kernels, PagedShape, by_token, head_width
from trunkline.kernels.ref.quantized import dequantize_kv, quantize_kv

NAN = float("nan")
FORMS = {
    "int8": {"dtype": torch.int8},
    "capped": {"soft_cap": 5.0},
    "scaled": {"scale": 0.31},
    "int8, capped, scaled": {"dtype": torch.int8, "soft_cap": 3.0, "scale": 0.2},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.fixture(params=FORMS.values(), ids=list(FORMS))
def form(request: pytest.FixtureRequest) -> dict[str, object]:
    return dict(request.param)


def held(kv: Tensor, dtype: torch.dtype) -> Tensor:
    """What a pool of this type makes of keys and values."""
    return dequantize_kv(quantize_kv(kv)) if dtype == torch.int8 else kv.to(dtype).float()


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("window", [None, 150])
def test_equals_the_oracle(
    kernels: Kernels, heads: tuple[int, int, int], window: int | None, form: dict[str, object]
) -> None:
    pool = Pool(heads, page_size=4, num_pages=600, **form)  # type: ignore[arg-type]
    for narrow, limit in ((False, 3e-6), (True, 6e-3)):
        parts, expected = [], []
        for seed, (length, q_len) in enumerate([(1, 1), (129, 129), (700, 40), (131, 3)]):
            q, kv = sequence(heads, length, seed)
            q = q.bfloat16() if narrow else q
            kv[:, :, 0] *= 1 + 9 * torch.rand(length, 2, 1)  # scales differ
            parts.append((q[-q_len:], length, pool.place(kv)))
            shape = pool.shape
            exact = held(kv, pool.dtype)
            expected.append(oracle(q[-q_len:], exact, length - q_len, window, shape.soft_cap, shape.scale))
        for found, wanted in zip(attend(kernels, pool, window, parts), expected, strict=True):
            assert float((found.double() - wanted).norm() / wanted.norm()) < limit
        pool.free = list(range(pool.num_pages))


@pytest.mark.parametrize("heads", [(4, 2, 64), (6, 6, 10), (9, 3, 40)], ids=str)
@pytest.mark.parametrize("window", [None, 200])
def test_no_batch_chunk_page_or_thread_changes_a_bit(
    kernels: Kernels, heads: tuple[int, int, int], window: int | None, threads: int, form: dict[str, object]
) -> None:
    length = 420
    q, kv = sequence(heads, length, 5)
    torch.set_num_threads(1)
    reference = Pool(heads, page_size=16, num_pages=80, **form)  # type: ignore[arg-type]
    (whole,) = attend(kernels, reference, window, [(q, length, reference.place(kv))])
    torch.set_num_threads(threads)
    rng = np.random.default_rng(7)
    pool = Pool(heads, 12, num_pages=200, seed=1, **form)  # type: ignore[arg-type]
    pages = pool.place(kv)
    others = []
    for seed, (other_len, q_len) in enumerate([(300, 1), (40, 40)]):
        other_q, other_kv = sequence(heads, other_len, seed)
        others.append((other_q[-q_len:], other_len, pool.place(other_kv)))
    done = 0
    while done < length:
        size = min(int(rng.choice([1, 2, 7, 64, 150])), length - done)
        parts = [*others[: int(rng.integers(0, 3))], (q[done : done + size], done + size, pages)]
        assert torch.equal(attend(kernels, pool, window, parts)[-1], whole[done : done + size]), (done, size)
        done += size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 2, 64), (1, 1, 7), (3, 3, 130)], ids=str)
def test_storing_rounds_as_promised(
    kernels: Kernels, heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    _, count, dim = heads
    kv = (torch.randn(9, 2, count, dim) * torch.logspace(-30, 30, 9)[:, None, None, None]).to(dtype)
    kv[3, 0, 0] = 0
    kv[4, 1, 0, -1] = NAN
    kv[5, 0, 0, 0] = float("inf")
    kv[6, 0, 0] = 1e-40  # its scale is no bfloat16 but zero
    pool = torch.full((5, 2, count, 4, head_width(dim, torch.int8)), 77, dtype=torch.int8)
    slots = torch.tensor([3, 19, 0, 7, 8, 9, 1, 2, 12])
    kernels.store_kv(pool, slots, kv)
    tokens = by_token(pool).reshape(20, 2, count, -1)
    others = torch.ones(20, dtype=torch.bool)
    others[slots] = False
    assert (tokens[others] == 77).all()
    found, wanted = dequantize_kv(tokens[slots]), dequantize_kv(quantize_kv(kv))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert (found[3, 0, 0] == 0).all() and found[4, 1, 0].isnan().all() and found[5, 0, 0].isnan().all()
    good = [0, 1, 2, 7, 8]
    error = (found[good] - kv[good].float()).abs() / kv[good].float().abs().amax(-1, keepdim=True)
    assert float(error.max()) < 0.006


def test_a_head_that_is_not_finite_reaches_only_those_who_see_it(kernels: Kernels) -> None:
    heads = (4, 2, 16)
    pool = Pool(heads, page_size=4, num_pages=100, dtype=torch.int8)
    q, kv = sequence(heads, 100, 1)
    bad = kv.clone()
    bad[50, 1, 0, 0] = NAN
    good, spoiled = attend(kernels, pool, None, [(q, 100, pool.place(kv)), (q, 100, pool.place(bad))])
    assert good.isfinite().all()
    assert not spoiled[50:, :2].isfinite().any()
    if kernels is not ref:
        assert torch.equal(spoiled[:50], good[:50])
    assert torch.equal(spoiled[50:, 2:], good[50:, 2:])


def test_an_int8_pool_holds_nearly_twice_the_tokens() -> None:
    for dim in (64, 128):
        assert 2 * dim / head_width(dim, torch.int8) >= 1.9


# Parents of the tokens of a tree, -1: the prefix
TREES = {
    "chain": [-1, 0, 1, 2, 3],
    "star": [-1, -1, -1, -1],
    "binary": [-1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6],
    "two": [-1, 0],
    "long": [-1, *[int(i) for i in np.random.default_rng(3).integers(-1, np.arange(1, 60))]],
}


def path_of(parents: list[int], token: int) -> list[int]:
    path = [token]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


def tree_mask(rows: int, columns: int, at: int, parents: list[int]) -> Tensor:
    """Other rows hold what must not be read."""
    mask = torch.ones(rows, columns, dtype=torch.bool)
    mask[at : at + len(parents), : len(parents)] = False
    for token in range(len(parents)):
        mask[at + token, path_of(parents, token)] = True
    return mask


@pytest.mark.parametrize("parents", TREES.values(), ids=list(TREES))
@pytest.mark.parametrize("prefix", [0, 3, 120, 128, 500])
@pytest.mark.parametrize(
    ("window", "form"), [(None, "scaled"), (5, "bfloat16"), (100, "int8, capped, scaled")]
)
def test_a_path_of_a_tree_is_that_path_alone(
    kernels: Kernels, parents: list[int], prefix: int, window: int | None, form: str
) -> None:
    heads, count = (6, 2, 40), len(parents)
    pool = Pool(heads, page_size=8, num_pages=400, **FORMS[form])  # type: ignore[arg-type]
    q, kv = sequence(heads, prefix + count, prefix)
    if form != "scaled":
        q = q.bfloat16()
    mine = (q[prefix:], prefix + count, pool.place(kv))
    before_q, before_kv = sequence(heads, 90, 1)  # longer than the mask has columns: no tree
    before = (before_q[10:].to(q.dtype), 90, pool.place(before_kv))
    single_q, single_kv = sequence(heads, 30, 2)
    single = (single_q[-1:].to(q.dtype), 30, pool.place(single_kv))
    torch.set_num_threads(2)
    mask = tree_mask(80 + count + 1, max(count, 2), 80, parents)
    found = attend(kernels, pool, window, [before, mine, single], mask)
    torch.set_num_threads(1)
    plain = attend(kernels, pool, window, [before, single])
    assert torch.equal(found[0], plain[0]) and torch.equal(found[2], plain[1])
    leaves = [token for token in range(count) if token not in parents]
    for leaf in leaves[:: max(1, len(leaves) // 6)]:
        path = path_of(parents, leaf)
        alone = torch.cat((kv[:prefix], kv[prefix:][path]))
        pages = pool.place(alone)
        (wanted,) = attend(kernels, pool, window, [(q[prefix:][path], len(alone), pages)])
        assert torch.equal(found[1][path], wanted), leaf
        pool.free += pages


def test_a_spoiled_branch_leaves_the_others(kernels: Kernels) -> None:
    heads, parents = (2, 1, 16), [-1, 0, 0, 1, 2]
    pool = Pool(heads, page_size=4, num_pages=60)
    q, kv = sequence(heads, 25, 1)
    bad = kv.clone()
    bad[21] = NAN  # token 1, which 3 descends from
    mask = tree_mask(5, 5, 0, parents)
    (good,) = attend(kernels, pool, None, [(q[20:], 25, pool.place(kv))], mask)
    (found,) = attend(kernels, pool, None, [(q[20:], 25, pool.place(bad))], mask)
    assert torch.equal(found[[0, 2, 4]], good[[0, 2, 4]])
    assert not found[[1, 3]].isfinite().any()


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (torch.ones(4, 3, dtype=torch.bool), "token 0 sees token 1|sees itself, and none after"),
        (torch.zeros(4, 3, dtype=torch.bool), "token 0 does not see itself|sees itself, and none after"),
        (torch.ones(3, 3, dtype=torch.bool), r"tree_mask is .*\[3, 3\]"),
        (torch.ones(4, 3, dtype=torch.int32), r"tree_mask is .*\[4, 3\]"),
    ],
)
def test_wrong_trees_are_refused(kernels: Kernels, mask: Tensor, error: str) -> None:
    starts, lengths = torch.tensor([0, 3, 4], dtype=torch.int32), torch.tensor([9, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=error):
        kernels.plan_attention(
            starts, lengths, torch.zeros(2, 9, dtype=torch.int32), None, PagedShape(2, 1, 8, 1, 20), mask
        )
