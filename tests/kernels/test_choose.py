"""`choose` on every instruction set against plain torch, to the bit: every token, for every kind of row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from trunkline.kernels import ref
from trunkline.kernels.ops import MOST_KEPT, Adjustment, Choices, Kernels, Quantization, TokenMasks
from trunkline.kernels.ref.choose import weigh

SIZES = [1, 5, 63, 64, 65, 1000, 2500]
ROWS = 120


def random_logits(rng: np.random.Generator, rows: int, size: int) -> Tensor:
    """Flat, peaked, and with many equals."""
    logits = torch.from_numpy(rng.normal(size=(rows, size))).float()
    logits *= torch.from_numpy(rng.choice([0.0, 0.01, 1.0, 4.0, 60.0], size=(rows, 1)))
    coarse = torch.from_numpy(rng.random((rows, 1)) < 0.3)
    return torch.where(coarse, logits.round(), logits)


def random_choices(rng: np.random.Generator, rows: int, size: int) -> Choices:
    def some(values: list[float], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(rng.choice(values, size=rows)).to(dtype)

    ids = rng.integers(0, size, (rows, 40)).astype(np.int32)
    adjustments = []
    for row in np.flatnonzero(rng.random(rows) < 0.5).tolist():
        length = int(rng.integers(0, 41))
        few = torch.from_numpy(rng.permutation(size)[: int(rng.integers(0, 4))])
        adjustments.append(
            Adjustment(
                row,
                torch.from_numpy(ids[row, :length]),
                int(rng.integers(0, length + 1)),
                float(rng.choice([1.0, 1.3, 0.7])),
                float(rng.choice([0.0, 0.5, -0.3])),
                float(rng.choice([0.0, 0.7])),
                few,
                torch.from_numpy(rng.normal(size=len(few)) * 5).float(),
                torch.from_numpy(rng.permutation(size)[: int(rng.integers(0, 3))]),
            )
        )
    return Choices(
        sharpness=some([0.0, 1.4427, 2.0, 0.3, 50.0], torch.float32),
        top_k=some([-1, -1, 1, 3, 50, 4000], torch.int64),
        top_p=some([1.0, 1.0, 0.95, 0.5, 0.0], torch.float64),
        min_p=some([0.0, 0.0, 0.01, 0.3, 1.0], torch.float64),
        u=torch.from_numpy(rng.random(rows)),
        adjustments=adjustments,
    )


def random_masks(rng: np.random.Generator, rows: int, size: int) -> TokenMasks:
    at = np.flatnonzero(rng.random(rows) < 0.4).tolist()
    bits = rng.random((len(at), -(-size // 32) * 32)) < rng.choice([0.02, 0.5, 1.0], size=(len(at), 1))
    bits[np.arange(len(at)), rng.integers(0, size, len(at))] = True
    return TokenMasks(at, np.packbits(bits, axis=1, bitorder="little").view(np.int32))


@pytest.mark.parametrize("size", SIZES)
def test_every_instruction_set_chooses_what_torch_does(
    native_kernels: Kernels, size: int, threads: int
) -> None:
    rng = np.random.default_rng(size)
    for masked in (False, True):
        logits = random_logits(rng, ROWS, size)
        logits[7, size // 2], logits[8, 0], logits[9, -1] = float("nan"), float("inf"), float("-inf")
        before, choices = logits.clone(), random_choices(rng, ROWS, size)
        masks = random_masks(rng, ROWS, size) if masked else None
        tokens, usable = native_kernels.choose(logits, choices, masks)
        expected, good = ref.choose(logits, choices, masks)
        assert torch.equal(usable, good) and not usable[7:10].any()
        assert torch.equal(tokens[good], expected[good])
        assert int(tokens.min()) >= 0 and int(tokens.max()) < size
        torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)


def test_a_vocabulary_of_real_size(native_kernels: Kernels) -> None:
    rng = np.random.default_rng(0)
    rows, size = 24, 151936
    logits, choices = random_logits(rng, rows, size), random_choices(rng, rows, size)
    tokens, usable = native_kernels.choose(logits, choices, None)
    expected, good = ref.choose(logits, choices, None)
    assert torch.equal(usable, good) and torch.equal(tokens[good], expected[good])


def test_rows_are_alone(native_kernels: Kernels) -> None:
    rng = np.random.default_rng(3)
    logits, choices = random_logits(rng, 40, 700), random_choices(rng, 40, 700)
    tokens, _ = native_kernels.choose(logits, choices, None)
    for row in range(40):
        at = slice(row, row + 1)
        changes = [a for a in choices.adjustments if a.row == row]
        alone = Choices(
            choices.sharpness[at],
            choices.top_k[at],
            choices.top_p[at],
            choices.min_p[at],
            choices.u[at],
            [Adjustment(**{**vars(a), "row": 0}) for a in changes],
        )
        assert native_kernels.choose(logits[at], alone, None)[0][0] == tokens[row]


def test_weights_are_powers_of_two() -> None:
    z = torch.linspace(-36, 0, 10001, dtype=torch.float32)
    found = weigh(z[None], torch.zeros(1, 1), torch.ones(1, 1))[0]
    wanted = (z.double() + 35).exp2()
    assert ((found - wanted).abs() <= 0.5 + 3e-7 * wanted).all()
    assert found[-1] == 2.0**35 and torch.equal(found, found.round())
    assert weigh(torch.tensor([[-40.0, float("-inf")]]), torch.zeros(1, 1), torch.ones(1, 1)).tolist() == [
        [0, 0]
    ]


def choices_of(**changes: object) -> Choices:
    columns: dict[str, object] = {
        "sharpness": torch.ones(2),
        "top_k": torch.zeros(2, dtype=torch.int64),
        "top_p": torch.ones(2, dtype=torch.float64),
        "min_p": torch.zeros(2, dtype=torch.float64),
        "u": torch.zeros(2, dtype=torch.float64),
    }
    return Choices(**{**columns, **changes})  # type: ignore[arg-type]


def adjustment(**changes: object) -> Adjustment:
    none = torch.zeros(0, dtype=torch.int64)
    fields = {
        "row": 0,
        "history": none.int(),
        "prompt_len": 0,
        "repetition": 1.0,
        "frequency": 0.0,
        "presence": 0.0,
    }
    rest = {"bias_ids": none, "bias_values": none.float(), "banned": none}
    return Adjustment(**{**fields, **rest, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "masks", "error"),
    [
        ({"u": torch.zeros(3, dtype=torch.float64)}, None, r"u is .*\[3\].*\[2\] of the right type"),
        ({"top_k": torch.zeros(2)}, None, "top_k is .*float32"),
        ({"adjustments": [adjustment(row=2)]}, None, "an adjustment of row 2 of 2"),
        ({"adjustments": [adjustment(banned=torch.tensor([9]))]}, None, "banned has 9; there are 9 columns"),
        ({"adjustments": [adjustment(history=torch.tensor([-1]).int())]}, None, "history has -1"),
        ({"adjustments": [adjustment(bias_ids=torch.tensor([1]))]}, None, r"bias_values is .*\[1\]"),
        ({}, TokenMasks([2], np.ones((1, 1), np.int32)), "a mask for row 2 of 2"),
        ({}, TokenMasks([0], np.ones((2, 1), np.int32)), r"\[1, 1 or more\]"),
    ],
)
def test_what_does_not_fit_is_refused(
    native_kernels: Kernels, changes: dict[str, object], masks: TokenMasks | None, error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        native_kernels.choose(torch.zeros(2, 9), choices_of(**changes), masks)


@pytest.mark.parametrize("outputs", [1, 16, 65, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_among_what_masks_allow(kernels: Kernels, outputs: int, dtype: torch.dtype, threads: int) -> None:
    torch.manual_seed(outputs)
    rng = np.random.default_rng(outputs)
    packed = kernels.pack_linear([torch.randn(outputs, 96).to(dtype)], [])
    x = torch.randn(130, 96).to(dtype)
    for rows in (1, 5, 130):
        masks = random_masks(rng, rows, outputs)
        logits = kernels.linear(x[:rows], packed, wide=True)
        index, finite = kernels.top(x[:rows], packed, masks)
        bits = np.unpackbits(masks.words.view(np.uint8), axis=1, bitorder="little")[:, :outputs]
        for i, row in enumerate(masks.at):
            logits[row, torch.from_numpy(bits[i]) == 0] = float("-inf")
        assert torch.equal(index, logits.argmax(-1)) and finite.all()
    bad = x[:3].clone()
    bad[1, 0] = float("nan")
    first = np.zeros((3, -(-outputs // 32)), np.int32)
    first[:, 0] = 1
    index, finite = kernels.top(bad, packed, TokenMasks([0, 1, 2], first))
    assert finite.tolist() == [True, False, True] and index[0] == index[2] == 0


def test_top_refuses_masks_that_do_not_fit(native_kernels: Kernels) -> None:
    packed = native_kernels.pack_linear([torch.ones(40, 8)], [])
    for masks, error in (
        (TokenMasks([3], np.ones((1, 2), np.int32)), "a mask for row 3 of 2"),
        (TokenMasks([0], np.ones((1, 1), np.int32)), r"\[1, 2 or more\]"),
    ):
        with pytest.raises(ValueError, match=error):
            native_kernels.top(torch.ones(2, 8), packed, masks)


def fast_choices(rng: np.random.Generator, rows: int) -> Choices:
    """Greedy ones, and a few candidates with every other filter."""

    def some(values: list[float], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(rng.choice(values, size=rows)).to(dtype)

    return Choices(
        sharpness=some([0.0, 0.5, 1.442695, 20.0, 1e-3], torch.float32),
        top_k=some([1, 2, 20, 50, 127, MOST_KEPT], torch.int64),
        top_p=some([1e-9, 0.3, 0.8, 0.95, 1.0], torch.float64),
        min_p=some([0.0, 0.0, 0.05, 0.4, 1.0], torch.float64),
        u=torch.from_numpy(rng.random(rows)),
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1 << 30),
    rows=st.integers(1, 140),
    outputs=st.integers(1, 3000),
    scale=st.sampled_from([0.0, 1e-3, 0.1, 1.0]),
    kind=st.sampled_from(["float32", "bfloat16", "int8"]),
    masked=st.booleans(),
    threads=st.integers(1, 4),
)
def test_candidates_without_logits_give_the_same_tokens(
    native_kernels: Kernels,
    seed: int,
    rows: int,
    outputs: int,
    scale: float,
    kind: str,
    masked: bool,
    threads: int,
) -> None:
    """Flat and peaked rows, with many equals (few different weights), any number of rows and threads."""
    rng = np.random.default_rng(seed)
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    weight = torch.from_numpy(rng.integers(-8, 9, (outputs, 24)) * scale).to(dtype)
    weight[rng.integers(0, outputs, outputs // 2)] = weight[0].clone()  # equals
    packed = native_kernels.pack_linear([weight], [], Quantization(8) if kind == "int8" else None)
    x = torch.from_numpy(rng.normal(size=(rows, 24))).to(dtype)
    x[rows // 2, 3] = float("nan") if seed % 3 == 0 else 1.0
    choices = fast_choices(rng, rows)
    masks = random_masks(rng, rows, outputs) if masked else None
    torch.set_num_threads(threads)
    tokens, usable = native_kernels.top(x, packed, masks, choices)
    torch.set_num_threads(1)
    logits = native_kernels.linear(x, packed, wide=True)
    expected, good = native_kernels.choose(logits, choices, masks)
    assert torch.equal(usable, good) and torch.equal(tokens, expected)


def test_what_sums_of_weights_cannot_tell_is_found_from_all_logits(native_kernels: Kernels) -> None:
    """Two equal weights and `top_p` of exactly half: the second is kept, since no more than that is ahead."""
    packed = native_kernels.pack_linear([torch.tensor([[1.0], [0.0], [1.0]] * 40)], [])
    x, count = torch.full((50, 1), 80.0), 50
    for top_p, kept in ((0.5, 41), (0.5 - 1e-9, 40), (0.5 - 1e-12, 40), (0.25, 21)):
        choices = Choices(
            torch.ones(count),
            torch.full((count,), 100),
            torch.full((count,), top_p, dtype=torch.float64),
            torch.zeros(count, dtype=torch.float64),
            torch.linspace(0, 0.999, count, dtype=torch.float64),
        )
        for masks in (None, TokenMasks([3, 49], np.full((2, 4), -1, np.int32))):
            tokens, usable = native_kernels.top(x, packed, masks, choices)
            expected, good = native_kernels.choose(
                native_kernels.linear(x, packed, wide=True), choices, masks
            )
            assert torch.equal(tokens, expected) and torch.equal(usable, good)
        assert int(tokens.max()) == [i for i in range(120) if i % 3 != 1][kept - 1]


@pytest.mark.parametrize("top_k", [0, MOST_KEPT + 1])
def test_top_refuses_rows_that_need_all_logits(native_kernels: Kernels, top_k: int) -> None:
    packed = native_kernels.pack_linear([torch.ones(40, 8)], [])
    with pytest.raises(ValueError, match=rf"keeps {top_k} columns.*1 to {MOST_KEPT} are possible"):
        native_kernels.top(torch.ones(2, 8), packed, None, choices_of(top_k=torch.full((2,), top_k)))
    with pytest.raises(ValueError, match="an adjustment, none is"):
        native_kernels.top(
            torch.ones(2, 8),
            packed,
            None,
            choices_of(top_k=torch.full((2,), 1), adjustments=[adjustment(row=1)]),
        )
