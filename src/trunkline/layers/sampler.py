"""From logits to tokens. What a row gets depends on its own logits, parameters and tokens only.

Order of operations (SGLang's): penalties, logit bias, banned stop tokens, masks, temperature, softmax, then
the filters top-k, top-p and min-p, each judging the probabilities of the whole vocabulary. How exactly, to
the bit, `Choices` of `kernels/ops.py` says; `Kernels.choose` does it. Randomness is a counter-based hash of
(seed, position), so a request draws the same numbers in any batch, and again after a preemption.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trunkline.kernels.ops import MOST_KEPT, Adjustment, Choices
from trunkline.types import LogprobParams, SamplingParams

GREEDY_BELOW = 1e-6  # temperatures under it mean "the most likely token"
_LOG2E = math.log2(math.e)
_FRACTION_BITS = 52  # of the uniform number: u * total stays below total in float64


@dataclass(frozen=True)
class RowSampling:
    """What the sampler knows about one row. Made when the row is admitted."""

    params: SamplingParams
    logprobs: LogprobParams | None
    prompt_len: int
    seed: int  # signed 64 bit
    stop_ids: Tensor  # int64: may not be chosen before `min_new_tokens`
    bias_ids: Tensor  # int64
    bias_values: Tensor  # float32
    guided: bool = False  # masks come with its steps

    @property
    def greedy(self) -> bool:
        return self.params.temperature < GREEDY_BELOW

    @property
    def penalized(self) -> bool:
        p = self.params
        return bool(p.frequency_penalty or p.presence_penalty or p.repetition_penalty != 1.0)

    @property
    def adjusts(self) -> bool:
        """Whether the logits change before sampling."""
        return self.penalized or bool(self.params.logit_bias) or self.params.min_new_tokens > 0

    @property
    def needs_logits(self) -> bool:
        """Whether more is asked than which of the largest logits to take, of all or of a mask's."""
        few = self.greedy or 0 < self.params.top_k <= MOST_KEPT
        return not few or self.adjusts or self.logprobs is not None


def row_sampling(
    params: SamplingParams,
    logprobs: LogprobParams | None,
    prompt_len: int,
    eos_token_ids: tuple[int, ...],
    device: torch.device,
    *,
    guided: bool = False,
) -> RowSampling:
    seed = (params.sampling_seed or 0) & (2**64 - 1)
    stop = sorted({*eos_token_ids, *params.stop_token_ids}) if params.min_new_tokens > 0 else []
    return RowSampling(
        params,
        logprobs,
        prompt_len,
        seed - 2**64 if seed >= 2**63 else seed,
        torch.tensor(stop, dtype=torch.int64, device=device),
        torch.tensor(list(params.logit_bias), dtype=torch.int64, device=device),
        torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device),
        guided,
    )


def choices_of(
    rows: Sequence[RowSampling], positions: Sequence[int], history: Callable[[int], Tensor]
) -> Choices:
    """How each row chooses its token.

    `positions[i]` is where row i's new token goes; `history(i)` gives the tokens [positions[i]] before it.
    A mask has the last word: it knows of `min_new_tokens`, so no stop tokens are banned in its row.
    """
    params = [row.params for row in rows]
    return Choices(
        sharpness=torch.tensor(
            [0.0 if row.greedy else _LOG2E / row.params.temperature for row in rows], dtype=torch.float32
        ),
        top_k=torch.tensor([p.top_k for p in params], dtype=torch.int64),
        top_p=torch.tensor([p.top_p for p in params], dtype=torch.float64),
        min_p=torch.tensor([p.min_p for p in params], dtype=torch.float64),
        u=uniform(torch.tensor([row.seed for row in rows]), torch.tensor(positions)),
        adjustments=[_adjustment(i, row, history(i)) for i, row in enumerate(rows) if row.adjusts],
    )


def _adjustment(index: int, row: RowSampling, history: Tensor) -> Adjustment:
    params = row.params
    banned = row.stop_ids if len(history) - row.prompt_len < params.min_new_tokens else row.stop_ids[:0]
    return Adjustment(
        index,
        history,
        row.prompt_len,
        params.repetition_penalty,
        params.frequency_penalty,
        params.presence_penalty,
        row.bias_ids,
        row.bias_values,
        banned,
    )


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Numbers in [0, 1) from int64 seeds and positions: two rounds of SplitMix64's finalizer (Steele et al.,
    2014). Float64."""
    mixed = _mix(_mix(seeds) ^ positions)
    return ((mixed >> (64 - _FRACTION_BITS)) & ((1 << _FRACTION_BITS) - 1)).double() * 2.0**-_FRACTION_BITS


def _mix(x: Tensor) -> Tensor:
    """SplitMix64 on int64, whose arithmetic wraps; shifts are made logical by masking the sign's copies."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
