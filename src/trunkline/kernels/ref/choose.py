"""From logits to columns in plain torch, on any device: the definition that `Choices` gives, spelled out."""

from __future__ import annotations

import torch
from torch import Tensor

from trunkline.kernels.ops import WEIGHT_BITS, Adjustment, Choices, PackedLinear, TokenMasks
from trunkline.kernels.ref.dense import linear, masked

# 2^r for |r| <= 1/2, from the highest power down; the relative error is below 2e-9 before rounding.
_POWERS = (
    1.535336082e-4,
    1.339887484e-3,
    9.618437366e-3,
    5.550332470e-2,
    2.402264791e-1,
    6.931472029e-1,
    1.0,
)
_ROUNDER = 12582912.0  # 1.5 * 2^23: adding it to a float32 rounds to an integer


def choose(logits: Tensor, choices: Choices, masks: TokenMasks | None = None) -> tuple[Tensor, Tensor]:
    usable = (logits * 0).sum(-1) == 0  # NaN where one is not finite
    values = logits
    if choices.adjustments or masks is not None:
        values = logits.clone()
    bound = frozenset(() if masks is None else masks.at)
    for adjustment in choices.adjustments:
        _adjust(values[adjustment.row], adjustment, bans=adjustment.row not in bound)
    if masks is not None:
        values[list(masks.at)] = masked(values, masks)
    tokens = _largest(values)
    top = values.gather(-1, tokens[:, None])
    usable &= top[:, 0].isfinite()
    for filtered in (False, True):
        rows = (choices.sharpness > 0) & (choices.filters == filtered)
        at = rows.nonzero()[:, 0].to(logits.device)
        if not len(at):
            continue
        weights = weigh(values[at], top[at], choices.sharpness[rows].to(logits.device)[:, None])
        if filtered:
            for row, value, weight in zip(rows.nonzero()[:, 0].tolist(), values[at], weights, strict=True):
                _filter(value, weight, choices, row)
        tokens[at] = _pick(weights, choices.u[rows].to(logits.device))
    return tokens, usable


def top(
    x: Tensor, packed: PackedLinear, masks: TokenMasks | None = None, choices: Choices | None = None
) -> tuple[Tensor, Tensor]:
    if choices is None:
        zeros = torch.zeros(len(x), dtype=torch.float64)
        choices = Choices(zeros.float(), zeros.long(), zeros + 1, zeros, zeros)
    return choose(linear(x, packed, wide=True), choices, masks)


def weigh(values: Tensor, top: Tensor, sharpness: Tensor) -> Tensor:
    """The weights of columns [n, columns], whole numbers in float64; `top`, `sharpness` [n, 1] float32."""
    z = ((values - top) * sharpness).nan_to_num(nan=-60.0).clamp_(min=-60.0)
    whole = (z + _ROUNDER) - _ROUNDER
    rest = z - whole
    p = torch.full_like(z, _POWERS[0])
    for power in _POWERS[1:]:
        p.mul_(rest).add_(power)
    p.mul_(((whole.int() + (127 + WEIGHT_BITS)) << 23).view(torch.float32))
    return p.round_().double()


def _largest(logits: Tensor) -> Tensor:
    """Index [n] of the largest of each row, the first of equals. (On a CPU numpy finds it in a tenth of the
    time that torch takes.)"""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def _adjust(logits: Tensor, how: Adjustment, *, bans: bool) -> None:
    """One row, in place."""
    if how.repetition != 1.0:
        seen = how.history.long().unique()
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / how.repetition, values * how.repetition)
    if how.frequency or how.presence:
        seen, counts = how.history[how.prompt_len :].long().unique(return_counts=True)
        logits[seen] -= counts.float() * how.frequency + how.presence
    if len(how.bias_ids):
        logits[how.bias_ids] += how.bias_values
    if bans and len(how.banned):
        logits[how.banned] = float("-inf")


def _filter(values: Tensor, weights: Tensor, choices: Choices, row: int) -> None:
    """Set the weights of what the filters take away to zero."""
    top_k, top_p = int(choices.top_k[row]), float(choices.top_p[row])
    order = values.sort(descending=True, stable=True).indices
    ranked = weights[order]
    taken = ranked < float(choices.min_p[row]) * 2.0**WEIGHT_BITS
    if top_k > 0:
        taken[top_k:] = True
    if top_p < 1:
        sums = ranked.cumsum(0)
        taken |= sums - ranked > top_p * sums[-1]
    weights[order[taken]] = 0.0


def _pick(weights: Tensor, u: Tensor) -> Tensor:
    """[n, columns], [n] -> [n]: the column in which the running sum passes u times the whole."""
    sums = weights.cumsum(-1)
    target = u * sums[:, -1]
    index = torch.searchsorted(sums, target[:, None], right=True)[:, 0]
    return index.clamp_(max=weights.shape[-1] - 1)  # only a row that is not usable gets there
