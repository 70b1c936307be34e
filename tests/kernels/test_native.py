"""What only the native kernels promise: bfloat16 everywhere, refusals with numbers, no foreign memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trunkline.kernels.cpu import native
from trunkline.kernels.cpu import ops as kernels
from trunkline.kernels.ops import PagedShape, Quantization

NAN = float("nan")
FLOATS = (torch.float32, torch.bfloat16)


def norm_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.fixture(autouse=True, params=native.isas())
def _isa(request: pytest.FixtureRequest) -> object:
    native.select_isa(request.param)
    assert native.isa() == request.param
    yield
    native.select_isa(native.isas()[0])


def product_and_size(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A product in float64, and what its rounding errors are relative to, which no cancellation shrinks:
    the length of the vector of each sum's terms."""
    wide, weight, bias = x.double(), weight.double(), bias.double()
    return wide @ weight.T + bias, (wide.square() @ weight.square().T + bias.square()).sqrt()


def padded(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A random matrix whose rows lie apart, with poison between them."""
    whole = torch.full((rows, columns + 5), NAN, dtype=dtype)
    whole[:, :columns] = torch.randn(rows, columns)
    return whole[:, :columns]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    rows=st.integers(1, 300),
    outputs=st.integers(1, 200),
    inputs=st.integers(1, 700),
    weights=st.sampled_from(FLOATS),
    inputs_type=st.sampled_from(FLOATS),
    gated=st.booleans(),
    threads=st.integers(1, 4),
)
def test_a_row_of_a_product_never_depends_on_the_others(
    seed: int,
    rows: int,
    outputs: int,
    inputs: int,
    weights: torch.dtype,
    inputs_type: torch.dtype,
    gated: bool,
    threads: int,
) -> None:
    torch.manual_seed(seed)
    x = padded(rows, inputs, inputs_type)
    left, right = torch.randn(outputs, inputs).to(weights), torch.randn(outputs, inputs).to(weights)
    biases = [torch.randn(outputs), torch.randn(outputs)]
    torch.set_num_threads(threads)
    if gated:
        packed = kernels.pack_gated(left, right, biases)
        gate, size = product_and_size(x, left, biases[0])
        up, up_size = product_and_size(x, right, biases[1])
        activated = gate * gate.sigmoid()
        expected, size = activated * up, size * up.abs() + activated.abs() * up_size
    else:
        packed = kernels.pack_linear([left], biases[:1])
        expected, size = product_and_size(x, left, biases[0])
    out = kernels.linear(x, packed, None, True)
    assert float(((out.double() - expected).abs() / size).max()) < 2e-5
    torch.set_num_threads(1)
    begin = int(torch.randint(0, rows, ()))
    end = int(torch.randint(begin + 1, min(rows, begin + 8) + 1, ()))
    assert torch.equal(kernels.linear(x[begin:end], packed, None, True), out[begin:end])


@pytest.mark.parametrize("inputs", [64, 77])
def test_every_number_of_rows_gives_the_same_row(inputs: int) -> None:
    torch.manual_seed(inputs)
    x, weight = torch.randn(300, inputs).bfloat16(), torch.randn(48, inputs).bfloat16()
    packed = kernels.pack_linear([weight], [])
    whole = kernels.linear(x, packed)
    for rows in range(1, 301):
        assert torch.equal(kernels.linear(x[:rows], packed), whole[:rows])


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_row_is_the_same_in_every_block_of_rows(bits: Literal[16, 8, 4]) -> None:
    """Tiles let as many rows pass a slab as fit the second cache: here there are several such blocks."""
    torch.manual_seed(bits)
    x, weight = torch.randn(2200, 1090).bfloat16(), torch.randn(70, 1090).bfloat16()
    packed = kernels.pack_linear(
        [weight], [], None if bits == 16 else Quantization(bits, 32 if bits == 4 else 0)
    )
    whole = kernels.linear(x, packed, None, True)
    for begin, end in ((0, 1), (440, 452), (895, 899), (1100, 1140), (2199, 2200)):
        assert torch.equal(kernels.linear(x[begin:end], packed, None, True), whole[begin:end])


def test_steps_of_a_tile_meet_subnormal_numbers_as_its_vectors_do() -> None:
    """One row is computed with vectors, twenty with tiles where there are any: the same bits."""
    torch.manual_seed(0)
    numbers = torch.randn(68, 96) * torch.exp2(
        torch.randint(-72, -55, (68, 96))
    )  # products are subnormal, or nearly
    numbers[:20, ::5] = torch.randn(20, 20) * 1e-39
    numbers[20:, ::5] = torch.randn(48, 20) * 1e12
    packed = kernels.pack_linear([numbers[20:].bfloat16()], [])
    x = numbers[:20].bfloat16()
    whole = kernels.linear(x, packed, None, True)
    assert (whole != 0).any() and whole.isfinite().all()
    for row in range(20):
        assert torch.equal(kernels.linear(x[row : row + 1], packed, None, True), whole[row : row + 1])


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    x = torch.randn(13, 40)
    x[7, 3] = value
    for packed in (
        kernels.pack_linear([torch.randn(20, 40)], []),
        kernels.pack_gated(torch.randn(20, 40), torch.randn(20, 40), []),
    ):
        finite = kernels.linear(x, packed).isfinite()
        assert finite[[i for i in range(13) if i != 7]].all()
    spoiled = kernels.linear(x, kernels.pack_linear([torch.ones(20, 40)], []))
    assert not spoiled[7].isfinite().any()
    normed = kernels.rms_norm(x, torch.ones(40), 1e-6)
    assert not normed[7].isfinite().all() and normed[:7].isfinite().all() and normed[8:].isfinite().all()


def test_rounding_to_bfloat16_is_torch_s() -> None:
    """Ties, subnormal numbers, overflow to infinity: attention over one key returns its value, rounded."""
    torch.manual_seed(0)
    random = torch.randint(-(1 << 31), 1 << 31, (5000,))
    edges = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00000001, 0x00018000])
    values = torch.cat((random, edges)).to(torch.int32).view(torch.float32)
    values = values[values.isfinite()]
    count = len(values)
    pool = torch.zeros(count, 2, 1, 1, 16)
    pool[:, 1, 0, 0, 0] = values
    plan = kernels.plan_attention(
        torch.arange(count + 1, dtype=torch.int32),
        torch.ones(count, dtype=torch.int32),
        torch.arange(count, dtype=torch.int32)[:, None],
        None,
        PagedShape(1, 1, 16, 1, count),
    )
    found = kernels.attention(torch.zeros(count, 1, 16, dtype=torch.bfloat16), pool, plan)
    assert torch.equal(found[:, 0, 0], values.bfloat16())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (5, 1, 24), (16, 8, 128)])
@pytest.mark.parametrize("window", [None, 90])
def test_attention_in_each_type(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, window: int | None
) -> None:
    torch.manual_seed(dim)
    length, page = 600, 7
    kv, q = torch.randn(length, 2, kv_heads, dim).to(dtype), torch.randn(length, heads, dim).to(dtype)
    pages = torch.randperm(100)[: -(-length // page)].int()
    shape = PagedShape(heads, kv_heads, dim, page, 700)
    pool = torch.full((100, 2, kv_heads, page, dim), NAN, dtype=dtype)
    positions = torch.arange(length)
    kernels.store_kv(pool, pages[positions // page].long() * page + positions % page, kv)

    def attend(first: int, end: int) -> Tensor:
        q_start = torch.tensor([0, end - first], dtype=torch.int32)
        plan = kernels.plan_attention(
            q_start, torch.tensor([end], dtype=torch.int32), pages[None], window, shape
        )
        return kernels.attention(q[first:end], pool, plan)

    whole = attend(0, length)
    keys, values = (kv[:, i].double().repeat_interleave(heads // kv_heads, 1) for i in (0, 1))
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * dim**-0.5
    hidden = positions[None] > positions[:, None]
    if window is not None:
        hidden |= positions[None] <= positions[:, None] - window
    expected = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), values)
    assert norm_error(whole, expected) < (3e-3 if dtype == torch.bfloat16 else 2e-6)
    for threads in (1, 2, 3):  # the last queries alone: split over blocks when there are threads for it
        torch.set_num_threads(threads)
        for first, end in ((599, 600), (127, 129), (0, 1), (255, 300)):
            assert torch.equal(attend(first, end), whole[first:end])


def test_a_later_token_that_is_not_finite_reaches_no_earlier_one() -> None:
    torch.manual_seed(0)
    length, shape = 200, PagedShape(4, 2, 32, 16, 208)
    pool, q = torch.randn(13, 2, 2, 16, 32), torch.randn(length, 4, 32)
    plan = kernels.plan_attention(
        torch.tensor([0, length], dtype=torch.int32),
        torch.tensor([length], dtype=torch.int32),
        torch.arange(13, dtype=torch.int32)[None],
        None,
        shape,
    )
    clean = kernels.attention(q, pool, plan)
    pool[150 // 16, :, :, 150 % 16] = NAN
    found = kernels.attention(q, pool, plan)
    assert torch.equal(found[:150], clean[:150])
    assert not found[150:].isfinite().any()


PACKED = kernels.pack_linear([torch.randn(20, 8)], [])
PLAN = (
    torch.tensor([0, 2], dtype=torch.int32),
    torch.tensor([9], dtype=torch.int32),
    torch.tensor([[0, 3, 1]], dtype=torch.int32),
)
SHAPE = PagedShape(4, 2, 8, 4, 16)


def attention_of(q: Tensor, pool: Tensor) -> Tensor:
    return kernels.attention(q, pool, kernels.plan_attention(*PLAN, None, SHAPE))


WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: kernels.linear(torch.randn(3, 9), PACKED), r"\[3, 9\].*\[\*, 8\]"),
    (lambda: kernels.linear(torch.randn(3, 8).double(), PACKED), "float64"),
    (lambda: kernels.linear(torch.randn(8, 3).T, PACKED), r"strides \(1, 3\)"),
    (lambda: kernels.linear(torch.randn(3, 8, device="meta"), PACKED), "meta"),
    (lambda: kernels.linear(torch.randn(3, 8), PACKED, torch.randn(3, 19)), r"residual is .*\[3, 19\]"),
    (lambda: kernels.pack_linear([torch.randn(3, 8), torch.randn(3, 9)], []), r"\[3, 9\].*\[\*, 8\]"),
    (lambda: kernels.pack_gated(torch.randn(3, 8), torch.randn(4, 8), []), "two equal parts"),
    (lambda: kernels.rms_norm(torch.randn(3, 8), torch.randn(9), 1e-6), r"\[9\].*\[3, 8\]"),
    (lambda: kernels.rope(torch.randn(3, 2, 7), torch.randn(3, 2, 7)), "an even number"),
    (lambda: kernels.rope(torch.randn(3, 2, 8), torch.randn(2, 2, 8)), r"\[3, 2, 8\]"),
    (lambda: kernels.store_kv(torch.randn(4, 2, 1, 1, 8), torch.tensor([0]), torch.randn(1, 2, 1, 9)), "9"),
    (lambda: kernels.plan_attention(PLAN[0], PLAN[1] + 4, PLAN[2], None, SHAPE), "3 pages of 4"),
    (lambda: kernels.plan_attention(PLAN[0], PLAN[1], PLAN[2] + 1, None, SHAPE), "page 4; the pool has 4"),
    (lambda: kernels.plan_attention(PLAN[0], PLAN[1] - 8, PLAN[2], None, SHAPE), "2 tokens .* length of 1"),
    (lambda: attention_of(torch.randn(3, 4, 8), torch.randn(5, 2, 2, 4, 8)), r"\[2, a multiple of 2, 8\]"),
    (lambda: attention_of(torch.randn(2, 4, 8), torch.randn(3, 2, 2, 4, 8)), "4 or more"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_what_does_not_fit_is_refused_with_numbers(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("bad", [-1, 20, 1 << 40])
def test_indices_out_of_bounds_are_refused(bad: int) -> None:
    ids = torch.tensor([0, bad])
    weight = torch.randn(20, 8)
    for table in (weight, kernels.embedding_table(weight, PACKED)):
        with pytest.raises(IndexError, match=rf"{bad} at 1 is not in \[0, 20\)"):
            kernels.embedding(ids, table)
    with pytest.raises(IndexError, match="is not in"):
        kernels.store_kv(torch.zeros(5, 2, 1, 4, 4), ids, torch.randn(2, 2, 1, 4))


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="sse9 is not available"):
        native.select_isa("sse9")


def test_nothing_is_no_work() -> None:
    assert kernels.linear(torch.empty(0, 8), PACKED).shape == (0, 20)
    assert kernels.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-6).shape == (0, 8)
    table = kernels.embedding_table(torch.randn(20, 8), PACKED)
    assert kernels.embedding(torch.empty(0, dtype=torch.int32), table).shape == (0, 8)
