"""Dense ops against float64 by relative norm, and batch invariance to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import get_args

import pytest
import torch
from torch import Tensor

from trunkline.kernels.ops import Activation, Kernels, Quantization, by_token
from trunkline.kernels.ref.dense import apply_gate

# (out, in)
SIZES = [(16, 16), (33, 17), (96, 72), (512, 256), (64, 8192), (1000, 999), (257, 640), (300, 3072)]
ROWS = 150


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def splits(rows: int, seed: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows: single ones at the ends, a little more and less than tiles take, random ones."""
    generator = torch.Generator().manual_seed(seed)
    yield from [(0, 1), (rows - 1, rows), (0, rows), (0, min(rows, 17)), (max(rows - 31, 0), rows)]
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
def test_linear(kernels: Kernels, outputs: int, inputs: int, with_bias: bool, threads: int) -> None:
    torch.manual_seed(outputs)
    weight, x, residual = torch.randn(outputs, inputs), torch.randn(ROWS, inputs), torch.randn(ROWS, outputs)
    biases = [torch.randn(outputs // 3), torch.randn(outputs - outputs // 3)] if with_bias else []
    packed = kernels.pack_linear(list(weight.split([outputs // 3, outputs - outputs // 3])), biases)
    expected = x.double() @ weight.double().T + (torch.cat(biases).double() if biases else 0)
    assert relative_error(kernels.linear(x, packed), expected) < 2e-6
    assert relative_error(kernels.linear(x, packed, residual), expected + residual.double()) < 2e-6
    assert_batch_invariant(lambda part: kernels.linear(part, packed), x, threads)


@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_gated_linear(kernels: Kernels, outputs: int, inputs: int, with_bias: bool, threads: int) -> None:
    torch.manual_seed(outputs)
    gate, up, x = torch.randn(outputs, inputs), torch.randn(outputs, inputs), torch.randn(ROWS, inputs)
    biases = [torch.randn(outputs), torch.randn(outputs)] if with_bias else []
    packed = kernels.pack_gated(gate, up, biases)
    left, right = x.double() @ gate.double().T, x.double() @ up.double().T
    if biases:
        left, right = left + biases[0].double(), right + biases[1].double()
    expected = left * torch.sigmoid(left) * right
    assert relative_error(kernels.gated_linear(x, packed), expected) < 3e-6
    assert_batch_invariant(lambda part: kernels.gated_linear(part, packed), x, threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_support_of_a_dtype_is_told(kernels: Kernels, dtype: torch.dtype) -> None:
    if kernels.supports_linear(dtype, torch.device("cpu")):
        packed = kernels.pack_linear([torch.eye(32, dtype=dtype)], [])
        x = torch.randn(5, 32).to(dtype)
        assert torch.equal(kernels.linear(x, packed), x)
    else:
        with pytest.raises((RuntimeError, ValueError)):
            kernels.pack_linear([torch.eye(32, dtype=dtype)], [])


@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_bfloat16_linear(kernels: Kernels, outputs: int, inputs: int, threads: int) -> None:
    if not kernels.supports_linear(torch.bfloat16, torch.device("cpu")):
        pytest.skip("this kernel set has no bfloat16 products on this CPU")
    torch.manual_seed(inputs)
    weight, x = torch.randn(outputs, inputs).bfloat16(), torch.randn(ROWS, inputs).bfloat16()
    packed = kernels.pack_linear([weight], [])
    expected = x.double() @ weight.double().T
    assert relative_error(kernels.linear(x, packed), expected) < 3e-3  # of the result's own rounding
    assert_batch_invariant(lambda part: kernels.linear(part, packed), x, threads)


@pytest.mark.parametrize("shape", [(17,), (256,), (5119,), (6, 64), (3, 20)])
def test_rms_norm(kernels: Kernels, shape: tuple[int, ...], threads: int) -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(ROWS, *shape) * 3, torch.randn(*shape)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    assert relative_error(kernels.rms_norm(x, weight, 1e-6), expected) < 1e-6
    assert_batch_invariant(lambda part: kernels.rms_norm(part, weight, 1e-6), x, threads)


@pytest.mark.parametrize("width", [1, 17, 88, 640, 3001])
def test_gates_in_torch(width: int, threads: int) -> None:
    torch.manual_seed(2)
    x = torch.randn(ROWS, 2 * width) * 4
    gate, up = x.double().chunk(2, -1)
    for activation in get_args(Activation):
        assert relative_error(apply_gate(x, activation), activated(gate, activation) * up) < 1e-6
        assert_batch_invariant(lambda part, name=activation: apply_gate(part, name), x, threads)


def activated(gate: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        return gate * torch.sigmoid(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_gates(kernels: Kernels, activation: Activation, bits: int | None, threads: int) -> None:
    torch.manual_seed(4)
    inputs, outputs = 96, 37
    quantization = None if bits is None else Quantization(bits, 32 if bits == 4 else 0)  # type: ignore[arg-type]
    gate, up = torch.randn(outputs, inputs) / 4, torch.randn(outputs, inputs) / 4
    biases = [torch.randn(outputs), torch.randn(outputs)]
    packed = kernels.pack_gated(gate, up, biases, quantization, activation)
    x = torch.randn(ROWS, inputs)
    exact = [x.double() @ w.double().T + b.double() for w, b in zip((gate, up), biases, strict=True)]
    error = relative_error(kernels.gated_linear(x, packed), activated(exact[0], activation) * exact[1])
    assert error < {None: 1e-6, 8: 0.02, 4: 0.3}[bits]
    assert_batch_invariant(lambda part: kernels.gated_linear(part, packed), x, threads)


def test_gelu_near_and_far_from_zero(native_kernels: Kernels) -> None:
    x = torch.cat((torch.linspace(-9, 9, 4001), torch.tensor([0.0, -0.0, 1e-20, -60.0, 60.0, -1e30, 1e30])))
    for activation in ("gelu", "gelu_tanh"):
        packed = native_kernels.pack_gated(
            torch.ones(1, 1), torch.zeros(1, 1), [torch.zeros(1), torch.ones(1)], None, activation
        )
        found = native_kernels.gated_linear(x[:, None], packed)[:, 0].double()
        wanted = activated(x.double(), activation)
        assert ((found - wanted).abs() <= 3e-7 + 6e-7 * wanted.abs()).all()
        bad = torch.tensor([[float("nan")], [1.0]])
        assert native_kernels.gated_linear(bad, packed).isfinite()[:, 0].tolist() == [False, True]


def test_silu_at_extremes(kernels: Kernels) -> None:
    packed = kernels.pack_gated(torch.eye(4), torch.eye(4), [torch.zeros(4), torch.ones(4)])
    x = torch.tensor([[-1e4, 1e4, -0.0, -100.0]])
    found = kernels.gated_linear(x, packed)
    assert found[0, :3].tolist() == [0.0, 1e4 * (1e4 + 1), 0.0]
    assert abs(float(found[0, 3])) < 1e-37


def rotation(tokens: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    angles = torch.rand(tokens, dim // 2) * 100
    cos, sin = angles.cos(), angles.sin()
    return cos, sin, torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1)


@pytest.mark.parametrize(("heads", "dim"), [(1, 2), (6, 64), (5, 20), (3, 128)])
@pytest.mark.parametrize("with_gain", [False, True])
def test_rope_rotates_pairs_of_halves(
    kernels: Kernels, heads: int, dim: int, with_gain: bool, threads: int
) -> None:
    torch.manual_seed(3)
    x, gain = torch.randn(ROWS, heads, dim), torch.randn(heads, dim) if with_gain else None
    cos, sin, table = rotation(ROWS, dim)
    wide = x.double()
    if gain is not None:
        wide = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain.double()
    left, right = wide.chunk(2, -1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    expected = torch.cat((left * c - right * s, right * c + left * s), -1)
    rotated = x.clone()
    kernels.rope(rotated, table, gain, 1e-6)
    assert relative_error(rotated, expected) < 1e-6
    for begin, end in splits(ROWS, seed=threads):
        part = x[begin:end].clone()
        kernels.rope(part, table[begin:end].clone(), gain, 1e-6)
        assert torch.equal(part, rotated[begin:end])


def test_rope_on_a_slice_leaves_its_neighbors_alone(kernels: Kernels) -> None:
    x, (_, _, table) = torch.randn(4, 5, 8), rotation(4, 8)
    before, alone = x.clone(), x[:, :3].clone()
    kernels.rope(x[:, :3], table)
    kernels.rope(alone, table)
    assert torch.equal(x[:, 3:], before[:, 3:])
    assert torch.equal(x[:, :3], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "inputs"), [(9, 4), (307, 48), (40, 7)])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_embedding_reads_rows(
    kernels: Kernels, dtype: torch.dtype, size: int, inputs: int, kind: torch.dtype
) -> None:
    weight, ids = torch.randn(size, inputs).to(dtype), torch.tensor([8, 0, 8, size - 1], dtype=kind)
    table = kernels.embedding_table(weight, None)
    assert torch.equal(kernels.embedding(ids, table), weight[ids.long()])
    if kernels.supports_linear(dtype, torch.device("cpu")):
        shared = kernels.embedding_table(weight, kernels.pack_linear([weight], []))
        assert torch.equal(kernels.embedding(ids, shared), weight[ids.long()])


def test_store_kv_writes_slots(kernels: Kernels) -> None:
    pool, kv = torch.zeros(3, 2, 3, 2, 4), torch.randn(2, 2, 3, 4)
    kernels.store_kv(pool, torch.tensor([5, 1]), kv)
    tokens = by_token(pool).reshape(6, 2, 3, 4)
    assert torch.equal(tokens[[5, 1]], kv)
    assert not tokens[[0, 2, 3, 4]].any()
    narrow = torch.zeros_like(pool, dtype=torch.bfloat16)
    kernels.store_kv(narrow, torch.tensor([5, 1]), kv)
    assert torch.equal(narrow, pool.bfloat16())
