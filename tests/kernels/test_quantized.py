"""Whole-number weights on every kernel set: against float64, the torch kernels and themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from trunkline.kernels import ref
from trunkline.kernels.ops import Kernels, Quantization

FORMATS = [
    Quantization(8),
    Quantization(4, 32),
    Quantization(4, 96),
    Quantization(4, 128),
    Quantization(4, 320),
]
IDS = ["int8", "int4-32", "int4-96", "int4-128", "int4-320"]
NAN, INF = float("nan"), float("inf")
FEW = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # the fixture only selects


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-6))


@pytest.mark.parametrize("quantization", FORMATS, ids=IDS)
@FEW
@given(
    seed=st.integers(0, 1 << 30),
    rows=st.integers(1, 130),
    outputs=st.integers(1, 150),
    inputs=st.integers(1, 400),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    gated=st.booleans(),
    threads=st.integers(1, 3),
)
def test_products_are_those_of_the_rounded_numbers_and_rows_stand_alone(
    kernels: Kernels,
    quantization: Quantization,
    seed: int,
    rows: int,
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    gated: bool,
    threads: int,
) -> None:
    torch.manual_seed(seed)
    x = torch.full((rows, inputs + 3), NAN, dtype=dtype)[:, :inputs]
    x.copy_(torch.randn(rows, inputs) * torch.rand(rows, 1).exp())
    weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(2)]
    biases = [torch.randn(outputs) for _ in range(2)]
    torch.set_num_threads(threads)
    if gated:
        packed = kernels.pack_gated(*weights, biases, quantization)
        oracle = ref.pack_gated(*weights, biases, quantization)
        found, expected = kernels.gated_linear(x, packed), ref.gated_linear(x, oracle)
    else:
        packed = kernels.pack_linear(weights, biases, quantization)
        oracle = ref.pack_linear(weights, biases, quantization)
        residual = torch.randn(rows, 2 * outputs).to(dtype)
        found, expected = kernels.linear(x, packed, residual), ref.linear(x, oracle, residual)
    assert found.dtype == dtype
    assert error(found, expected) < (8e-3 if dtype == torch.bfloat16 else 1e-5)
    torch.set_num_threads(1)
    begin = int(torch.randint(0, rows, ()))
    end = int(torch.randint(begin + 1, rows + 1, ()))
    alone = (
        kernels.gated_linear(x[begin:end], packed)
        if gated
        else kernels.linear(x[begin:end], packed, residual[begin:end])
    )
    assert torch.equal(alone, found[begin:end])


@pytest.mark.parametrize(
    ("quantization", "most"), list(zip(FORMATS, (0.012, 0.12, 0.14, 0.14, 0.16), strict=True)), ids=IDS
)
def test_rounding_costs_what_its_bits_say(kernels: Kernels, quantization: Quantization, most: float) -> None:
    """Normal weights and inputs, 1,024 of them: the error against the unrounded product."""
    torch.manual_seed(0)
    x, weight = torch.randn(20, 1024), torch.randn(64, 1024)
    found = kernels.linear(x, kernels.pack_linear([weight], [], quantization))
    assert most / 3 < error(found, x.double() @ weight.double().T) < most


@pytest.mark.parametrize("quantization", FORMATS, ids=IDS)
def test_the_rounded_embedding_is_the_head_s(kernels: Kernels, quantization: Quantization) -> None:
    torch.manual_seed(1)
    weight = torch.randn(150, 72)
    head = kernels.pack_linear([weight], [], quantization)
    ids = torch.tensor([149, 0, 7, 7, 64])
    found = kernels.embedding(ids, kernels.embedding_table(weight, head))
    expected = ref.dequantize(ref.pack_linear([weight], [], quantization), ids)
    assert error(found, expected) < 1e-6
    assert error(found, weight[ids]) < (0.01 if quantization.bits == 8 else 0.15)


@pytest.mark.parametrize("quantization", FORMATS, ids=IDS)
@pytest.mark.parametrize("value", [NAN, INF])
def test_what_is_not_finite_stays_in_its_row(
    kernels: Kernels, quantization: Quantization, value: float
) -> None:
    torch.manual_seed(2)
    x = torch.randn(13, 160)
    packed = kernels.pack_linear([torch.randn(20, 160)], [], quantization)
    clean = kernels.linear(x, packed)
    x[7, 3] = value
    found = kernels.linear(x, packed)
    assert not found[7].isfinite().any()
    others = [i for i in range(13) if i != 7]
    assert torch.equal(found[others], clean[others])
    x[7] = 0
    assert torch.equal(kernels.linear(x, packed)[7], torch.zeros(20))


@pytest.mark.parametrize("quantization", FORMATS, ids=IDS)
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_weight_that_is_not_finite_is_refused(
    kernels: Kernels, quantization: Quantization, value: float
) -> None:
    weight = torch.randn(20, 70)
    weight[19, 69] = value
    with pytest.raises(ValueError, match="not finite"):
        kernels.pack_linear([weight], [], quantization)


def test_scales_of_four_bits_are_float16(kernels: Kernels) -> None:
    """Tiny weights have subnormal scales; too large ones are refused."""
    four = Quantization(4, 32)
    weight, x = torch.full((16, 32), 3e-6), torch.ones(1, 32)
    found = kernels.linear(x, kernels.pack_linear([weight], [], four))
    assert error(found, ref.linear(x, ref.pack_linear([weight], [], four))) < 1e-6
    with pytest.raises(ValueError, match="too large"):
        kernels.pack_linear([torch.full((16, 32), 6e5)], [], four)


@pytest.mark.parametrize("quantization", [None, *FORMATS], ids=["whole", *IDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [1, 16, 65, 1000])
def test_top_is_the_arg_max_of_the_product(
    kernels: Kernels, quantization: Quantization | None, dtype: torch.dtype, outputs: int, threads: int
) -> None:
    torch.manual_seed(outputs)
    packed = kernels.pack_linear([torch.randn(outputs, 96).to(dtype)], [], quantization)
    x = torch.randn(130, 96).to(dtype)
    for rows in (1, 5, 130):
        logits = kernels.linear(x[:rows], packed, wide=True)
        index, finite = kernels.top(x[:rows], packed)
        assert torch.equal(index, logits.argmax(-1)) and finite.all()


def test_top_takes_the_first_of_equals_and_reports_what_is_not_finite(kernels: Kernels, threads: int) -> None:
    weight = torch.zeros(700, 8)
    weight[[100, 350, 650], 0] = 1
    x = torch.zeros(4, 8)
    x[0, 0], x[1, 1], x[2, 0], x[3, 0] = 1, NAN, INF, -1
    index, finite = kernels.top(x, kernels.pack_linear([weight], []))
    assert index[0] == 100 and index[3] == 0
    assert finite.tolist() == [True, False, False, True]
    assert index.min() >= 0 and index.max() < 700
