"""The sampler: each parameter against a plain reading of it, rows that can't touch each other, seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from trunkline.kernels.ops import Kernels, TokenMasks
from trunkline.layers.logprobs import logprobs_of
from trunkline.layers.sampler import RowSampling, choices_of, row_sampling, uniform
from trunkline.types import LogprobParams, SamplingParams

VOCAB = 2500
EOS = (7, 9)
CPU = torch.device("cpu")
VARIETY = [
    SamplingParams(temperature=0.0),
    SamplingParams(),
    SamplingParams(temperature=0.7, top_k=20),
    SamplingParams(temperature=1.3, top_p=0.8),
    SamplingParams(top_p=0.9999),
    SamplingParams(min_p=0.05),
    SamplingParams(top_k=2000, top_p=0.95, min_p=0.001),
    SamplingParams(temperature=0.0, repetition_penalty=1.5),
    SamplingParams(frequency_penalty=0.5, presence_penalty=-0.5, logit_bias={3: 4.0, 5: -100.0}),
    SamplingParams(min_new_tokens=50),
]


def logits_of(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4


def sample(
    kernels: Kernels,
    logits: Tensor,
    rows: Sequence[RowSampling],
    positions: Sequence[int],
    history: Callable[[int], Tensor],
    masks: TokenMasks | None = None,
) -> tuple[Tensor, Tensor]:
    return kernels.choose(logits, choices_of(rows, positions, history), masks)


def draw(
    kernels: Kernels,
    logits: Tensor,
    params: Sequence[SamplingParams],
    *,
    history: Sequence[list[int]] | None = None,
    prompt_len: int = 0,
    seeds: Sequence[int] | None = None,
    position: int = 5,
) -> tuple[list[int], list[bool]]:
    seeds = seeds if seeds is not None else range(len(params))
    rows = [
        row_sampling(msgspec.structs.replace(p, sampling_seed=s), None, prompt_len, EOS, CPU)
        for p, s in zip(params, seeds, strict=True)
    ]
    tokens = history or [[] for _ in params]
    found, usable = sample(
        kernels, logits, rows, [position] * len(rows), lambda i: torch.tensor(tokens[i], dtype=torch.int32)
    )
    return found.tolist(), usable.tolist()


def counts(kernels: Kernels, params: SamplingParams, logits: Tensor, n: int = 4000) -> Tensor:
    tokens, _ = draw(kernels, logits.expand(n, -1), [params] * n, seeds=range(n))
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1]) / n


def allowed(params: SamplingParams, probs: Tensor) -> Tensor:
    """The filters as they are documented, one token at a time."""
    order = probs.argsort(descending=True, stable=True)
    kept, mass = [], 0.0
    for rank, token in enumerate(order.tolist()):
        fits = params.top_k < 0 or rank < params.top_k
        if fits and mass <= params.top_p and probs[token] >= params.min_p * probs[order[0]]:
            kept.append(token)
        mass += float(probs[token])
    mask = torch.zeros(len(probs), dtype=torch.bool)
    mask[kept] = True
    return mask


@pytest.mark.parametrize("params", VARIETY[1:7], ids=repr)
def test_distribution(kernels: Kernels, params: SamplingParams) -> None:
    logits = logits_of(1)[:, :40]
    probs = torch.softmax(logits[0].double() / params.temperature, -1)
    mask = allowed(params, probs)
    expected = torch.where(mask, probs, 0.0)
    expected /= expected.sum()
    found = counts(kernels, params, logits)
    assert not found[~mask].any()
    assert (found - expected).abs().max() < 0.03


@pytest.mark.parametrize("params", VARIETY[2:7], ids=repr)
def test_filters_on_a_large_vocabulary_keep_exactly_the_documented_tokens(
    kernels: Kernels, params: SamplingParams
) -> None:
    """Flat and peaked distributions, so that the kept run ends inside and outside of the first candidates."""
    for scale in (0.05, 4.0):
        logits = logits_of(1)[0] / 4 * scale
        probs = torch.softmax((logits / params.temperature), -1)
        mask = allowed(params, probs.double())
        tokens, _ = draw(kernels, logits.expand(300, -1), [params] * 300)
        assert mask[tokens].all()
        if scale < 1 and int(mask.sum()) > 1024:
            ranks = probs.argsort(descending=True).argsort()
            assert ranks[tokens].max() > 1024  # the tail is reachable


def test_logit_bias_and_presence_penalty(kernels: Kernels) -> None:
    logits = torch.tensor([[3.0, 2.9, -1.0, 2.0]])

    def best(prompt_len: int = 1, **params: object) -> int:
        row = SamplingParams(temperature=0.0, **params)  # type: ignore[arg-type]
        return draw(kernels, logits, [row], history=[[0, 3, 3]], prompt_len=prompt_len)[0][0]

    assert best() == 0
    assert best(logit_bias={2: 4.1}) == 2
    assert best(logit_bias={0: -0.2, 3: 0.5}) == 1
    assert best(presence_penalty=2.0) == 0  # a prompt token is not an output
    assert best(presence_penalty=0.2, prompt_len=0) == 1
    assert best(presence_penalty=-1.1) == 3  # once, however often it occurs


def test_frequency_penalty_counts_each_occurrence_in_the_output(kernels: Kernels) -> None:
    logits = torch.tensor([[2.0, 1.9, 1.3]])
    params = SamplingParams(temperature=0.0, frequency_penalty=0.25)
    assert draw(kernels, logits, [params], history=[[0, 0, 0]], prompt_len=3)[0] == [0]
    assert draw(kernels, logits, [params], history=[[0, 0, 0]], prompt_len=2)[0] == [1]  # 2 - 0.25 < 1.9
    best = draw(kernels, logits, [params], history=[[0, 0, 0, 1, 1, 1]], prompt_len=0)[0]
    assert best == [2]  # 1.25, 1.15, 1.3


def test_stop_tokens_are_banned_until_the_minimum_length(kernels: Kernels) -> None:
    logits = torch.zeros(1, 12)
    logits[0, [7, 9, 3, 5]] = torch.tensor([9.0, 8.0, 7.0, 6.0])
    params = SamplingParams(temperature=0.0, min_new_tokens=2, stop_token_ids=(3,))
    assert draw(kernels, logits, [params], history=[[1, 1, 4]], prompt_len=2)[0] == [5]
    assert draw(kernels, logits, [params], history=[[1, 1, 4, 4]], prompt_len=2)[0] == [7]


def test_repetition_penalty_covers_prompt_and_output(kernels: Kernels) -> None:
    logits = torch.tensor([[3.0, -1.0, 2.0, -1.5]])
    params = SamplingParams(temperature=0.0, repetition_penalty=1.6)
    assert draw(kernels, logits, [params], history=[[0]], prompt_len=1)[0] == [2]
    assert draw(kernels, logits - 3.5, [params], history=[[0, 2]], prompt_len=1)[0] == [
        0
    ]  # -0.8 still beats -2.4


def test_rows_do_not_depend_on_each_other(kernels: Kernels) -> None:
    logits = logits_of(len(VARIETY))
    history = [[i, i + 1, i + 1, 3] for i in range(len(VARIETY))]
    together, _ = draw(kernels, logits, VARIETY, history=history, seeds=[40 + i for i in range(len(VARIETY))])
    for i, params in enumerate(VARIETY):
        alone, _ = draw(kernels, logits[i : i + 1], [params], history=history[i : i + 1], seeds=[40 + i])
        assert alone == [together[i]]
    order = torch.randperm(len(VARIETY), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled, _ = draw(
        kernels,
        logits[order],
        [VARIETY[i] for i in order],
        history=[history[i] for i in order],
        seeds=[40 + i for i in order],
    )
    assert shuffled == [together[i] for i in order]


def test_logits_are_left_unchanged(kernels: Kernels) -> None:
    logits = logits_of(len(VARIETY))
    before = logits.clone()
    draw(kernels, logits, VARIETY, history=[[1, 2, 3]] * len(VARIETY))
    assert torch.equal(logits, before)


def test_a_bad_row_is_reported_and_hurts_nobody(kernels: Kernels) -> None:
    logits = logits_of(5)
    params = [VARIETY[1], VARIETY[2], VARIETY[3], VARIETY[0], VARIETY[9]]
    expected, usable = draw(kernels, logits, params)
    assert usable == [True] * 5
    for bad, value in ((0, float("nan")), (1, float("inf")), (2, float("nan")), (3, float("-inf"))):
        broken = logits.clone()
        broken[bad, 100] = value
        tokens, usable = draw(kernels, broken, params)
        assert usable == [i != bad for i in range(5)]
        assert all(0 <= token < VOCAB for token in tokens)
        assert [t for i, t in enumerate(tokens) if i != bad] == [
            t for i, t in enumerate(expected) if i != bad
        ]


def test_everything_banned_is_reported(kernels: Kernels) -> None:
    rows = [
        row_sampling(SamplingParams(min_new_tokens=3, stop_token_ids=stop), None, 0, (), CPU)
        for stop in ((0, 1), (0,))
    ]
    tokens, usable = sample(
        kernels, torch.zeros(2, 2), rows, [0, 0], lambda i: torch.zeros(0, dtype=torch.int32)
    )
    assert usable.tolist() == [False, True]
    assert int(tokens[1]) == 1


def test_uniform_numbers_are_even_and_independent() -> None:
    seeds = torch.arange(-50, 50).repeat_interleave(200)
    positions = torch.arange(200).repeat(100)
    u = uniform(seeds, positions)
    assert u.dtype == torch.float64 and float(u.min()) >= 0 and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 0.01
    histogram = torch.histc(u.float(), 20, 0, 1)
    assert float(((histogram - 1000) ** 2 / 1000).sum()) < 45  # chi-square, 19 degrees of freedom, p = 0.001
    table = u.view(100, 200)
    for a, b in ((table[:-1], table[1:]), (table[:, :-1], table[:, 1:])):
        assert abs(float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1])) < 0.03
    assert len(u.unique()) == len(u)


def test_uniform_is_fixed_for_good() -> None:
    """A seed promises the same text in every release; the first value is SplitMix64's by its definition."""

    def finalize(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    for seed, position in ((0, 0), (-1, 3), (2**63 - 1, 10**6), (-(2**63), 1)):
        expected = (finalize(finalize(seed % 2**64) ^ position) >> 12) * 2.0**-52
        assert float(uniform(torch.tensor([seed]), torch.tensor([position]))) == expected


def test_logprobs_are_those_of_the_raw_distribution_whatever_the_batch() -> None:
    logits = logits_of(70)
    tokens = torch.arange(70) * 3
    wanted = LogprobParams(top_n=5, token_ids=(4, 2499))
    entries = logprobs_of(logits, tokens, wanted).to_host()
    table = logits.double().log_softmax(-1)
    for i, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(float(table[i, 3 * i]), abs=1e-5)
        assert [token for token, _ in entry.top] == table[i].topk(5).indices.tolist()
        assert [token for token, _ in entry.chosen] == [4, 2499]
        assert entry == logprobs_of(logits[i : i + 1], tokens[i : i + 1], wanted).to_host()[0]


class TestMasks:
    """Rows with a mask choose allowed tokens only; what they choose, and what other rows choose, is as if the
    other tokens had no probability."""

    VOCAB = 300  # not a multiple of 32

    def masks(self, at: list[int], allowed: list[list[int]]) -> TokenMasks:
        words = np.zeros((len(at), 12), np.uint32)
        for row, tokens in zip(words, allowed, strict=True):
            for token in tokens:
                row[token >> 5] |= np.uint32(1 << (token & 31))
        return TokenMasks(at, words.view(np.int32))

    @pytest.mark.parametrize(
        "params",
        [
            SamplingParams(temperature=0.0),
            SamplingParams(temperature=1.0, sampling_seed=3),
            SamplingParams(temperature=0.7, top_k=5, top_p=0.8, sampling_seed=3),
            SamplingParams(temperature=1.0, min_p=0.1, frequency_penalty=0.5, logit_bias={7: 4.0}),
        ],
    )
    @pytest.mark.parametrize("at", [[0, 1, 2, 3], [1], [0, 3]])
    def test_as_if_nothing_else_had_probability(
        self, kernels: Kernels, params: SamplingParams, at: list[int]
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        logits = torch.randn(4, self.VOCAB, generator=generator) * 3
        before = logits.clone()
        allowed = [sorted({7, 31, 32, 63 + i, 290 + i, 299}) for i in range(len(at))]
        rows = [row_sampling(params, None, 1, (), torch.device("cpu"), guided=True) for _ in range(4)]
        history = torch.tensor([7, 31, 7], dtype=torch.int32)
        positions = [3, 9, 27, 81]
        tokens, usable = sample(kernels, logits, rows, positions, lambda i: history, self.masks(at, allowed))
        banned = logits.clone()
        for i, kept in zip(at, allowed, strict=True):
            rest = [token for token in range(self.VOCAB) if token not in kept]
            banned[i, rest] = -1e30
            assert tokens[i] in kept
        assert torch.equal(tokens, sample(kernels, banned, rows, positions, lambda i: history)[0])
        assert usable.all() and torch.equal(logits, before)

    def test_a_mask_has_the_last_word_over_a_minimum(self, kernels: Kernels) -> None:
        params = SamplingParams(temperature=0.0, min_new_tokens=5, stop_token_ids=(40,))
        rows = [row_sampling(params, None, 1, (2,), torch.device("cpu"), guided=True) for _ in range(2)]
        logits = torch.zeros(2, self.VOCAB)
        logits[:, 40], logits[:, 2] = 3.0, 2.0
        tokens, usable = sample(
            kernels,
            logits,
            rows,
            [1, 1],
            lambda i: torch.zeros(1, dtype=torch.int32),
            self.masks([0], [[2, 40]]),
        )
        assert tokens[0] == 40 and tokens[1] not in (2, 40) and usable.all()

    def test_a_row_that_is_not_finite_shows_behind_its_mask(self, kernels: Kernels) -> None:
        params = SamplingParams(temperature=0.0)
        rows = [row_sampling(params, None, 1, (), torch.device("cpu"), guided=True) for _ in range(4)]
        logits = torch.zeros(4, self.VOCAB)
        logits[0, 5], logits[1, 5], logits[2, 5] = float("nan"), float("inf"), float("-inf")
        masks = self.masks([0, 1, 2, 3], [[9]] * 4)
        _, usable = sample(kernels, logits, rows, [1] * 4, lambda i: torch.zeros(1, dtype=torch.int32), masks)
        assert usable.tolist() == [False, False, False, True]
