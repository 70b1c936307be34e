"""Dense ops against float64 by relative norm, and batch invariance to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from trunkline.kernels import ref

SIZES = [(16, 16), (33, 17), (96, 72), (512, 256), (64, 8192), (1000, 999), (257, 640)]  # (out, in)
ROWS = 150


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def splits(rows: int, seed: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows: each single one at the ends, and random ones."""
    generator = torch.Generator().manual_seed(seed)
    yield from [(0, 1), (rows - 1, rows), (0, rows)]
    for _ in range(25):
        a, b = sorted(torch.randint(0, rows, (2,), generator=generator).tolist())
        yield a, b + 1


def assert_batch_invariant(op: Callable[[Tensor], Tensor], x: Tensor, threads: int) -> None:
    """Every row's result is that of the whole batch on one thread, in whatever batch it is computed."""
    torch.set_num_threads(1)
    whole = op(x)
    torch.set_num_threads(threads)
    for begin, end in splits(len(x), seed=threads):
        assert torch.equal(op(x[begin:end].clone()), whole[begin:end]), (begin, end)


@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(outputs: int, inputs: int, with_bias: bool, threads: int) -> None:
    torch.manual_seed(outputs)
    weight, x = torch.randn(outputs, inputs), torch.randn(ROWS, inputs)
    bias = torch.randn(outputs) if with_bias else None
    packed = ref.pack_linear(weight, bias)
    expected = x.double() @ weight.double().T + (bias.double() if bias is not None else 0)
    assert relative_error(ref.linear(x, packed), expected) < 1e-6
    assert_batch_invariant(lambda part: ref.linear(part, packed), x, threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_support_of_a_dtype_is_found_by_trying(dtype: torch.dtype) -> None:
    if ref.supports_linear(dtype, torch.device("cpu")):
        packed = ref.pack_linear(torch.eye(32, dtype=dtype), None)
        x = torch.randn(5, 32).to(dtype)
        assert torch.equal(ref.linear(x, packed), x)
    else:
        with pytest.raises(RuntimeError):
            ref.pack_linear(torch.eye(32, dtype=dtype), None)


def test_bfloat16_linear_is_batch_invariant_where_the_cpu_has_it(threads: int) -> None:
    if not ref.supports_linear(torch.bfloat16, torch.device("cpu")):
        pytest.skip("this CPU has no bfloat16 products")
    weight, x = torch.randn(96, 72).bfloat16(), torch.randn(ROWS, 72).bfloat16()
    packed = ref.pack_linear(weight, None)
    assert relative_error(ref.linear(x, packed), x.double() @ weight.double().T) < 1e-2
    assert_batch_invariant(lambda part: ref.linear(part, packed), x, threads)


@pytest.mark.parametrize("shape", [(17,), (256,), (5119,), (6, 64), (3, 20)])
def test_rms_norm(shape: tuple[int, ...], threads: int) -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(ROWS, *shape) * 3, torch.randn(*shape)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    assert relative_error(ref.rms_norm(x, weight, 1e-6), expected) < 1e-6
    assert_batch_invariant(lambda part: ref.rms_norm(part, weight, 1e-6), x, threads)


@pytest.mark.parametrize("width", [1, 17, 88, 640, 3001])
def test_silu_gate(width: int, threads: int) -> None:
    torch.manual_seed(2)
    x = torch.randn(ROWS, 2 * width) * 4
    gate, up = x.double().chunk(2, -1)
    assert relative_error(ref.silu_gate(x), gate * torch.sigmoid(gate) * up) < 1e-6
    assert_batch_invariant(ref.silu_gate, x, threads)


def test_silu_gate_at_extremes() -> None:
    x = torch.tensor([[-1e4, 1e4, -0.0, 0.0, 1.0, 1.0, 1.0, 1.0]])
    assert ref.silu_gate(x).tolist() == [[0.0, 1e4, 0.0, 0.0]]


@pytest.mark.parametrize(("heads", "dim"), [(1, 2), (6, 64), (5, 20)])
def test_rope_rotates_pairs_of_halves_and_may_work_in_place(heads: int, dim: int, threads: int) -> None:
    torch.manual_seed(3)
    x, angles = torch.randn(ROWS, heads, dim), torch.rand(ROWS, dim // 2) * 100
    cos, sin = angles.cos(), angles.sin()
    table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1)
    left, right = x.double().chunk(2, -1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    expected = torch.cat((left * c - right * s, right * c + left * s), -1)
    rotated = ref.rope(x, table, torch.empty_like(x))
    assert relative_error(rotated, expected) < 1e-6
    for begin, end in splits(ROWS, seed=threads):
        part = x[begin:end].clone()
        ref.rope(part, table[begin:end], part)
        assert torch.equal(part, rotated[begin:end])


def test_rope_in_place_on_a_slice_leaves_its_neighbors_alone() -> None:
    x, table = torch.randn(4, 5, 8), torch.randn(4, 2, 8)
    before = x.clone()
    ref.rope(x[:, :3], table, x[:, :3])
    assert torch.equal(x[:, 3:], before[:, 3:])
    assert torch.equal(x[:, :3], ref.rope(before[:, :3], table, torch.empty(4, 3, 8)))


def test_embedding_and_kv_store_address_rows() -> None:
    table = torch.randn(9, 4)
    assert torch.equal(ref.embedding(torch.tensor([8, 0, 8]), table), table[[8, 0, 8]])
    pool, kv = torch.zeros(6, 2, 3, 4), torch.randn(2, 2, 3, 4)
    ref.store_kv(pool, torch.tensor([5, 1]), kv)
    assert torch.equal(pool[[5, 1]], kv)
    assert not pool[[0, 2, 3, 4]].any()
