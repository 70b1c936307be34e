"""From logits to tokens. What a row gets depends on its own logits, parameters and tokens only.

Order of operations (SGLang's): penalties, logit bias, banned stop tokens, masks, temperature, softmax, then
the filters top-k, top-p and min-p, each judging the probabilities of the whole vocabulary. Randomness is a
counter-based hash of (seed, position), so a request draws the same numbers in any batch, and again after a
preemption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trunkline.types import LogprobParams, SamplingParams

GREEDY_BELOW = 1e-6  # temperatures under it mean "the most likely token"
_CANDIDATES = 1024  # most likely tokens to look at first when a filter without top-k needs an order
_MINUS_INFINITY = -(1 << 23)  # float32's bits, as an int32
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
        """Whether more is asked of the logits than which is the largest."""
        return not self.greedy or self.adjusts or self.guided or self.logprobs is not None

    @property
    def filters(self) -> bool:
        p = self.params
        return p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0


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


@dataclass(frozen=True)
class TokenMasks:
    """What some rows may choose: row `at[i]`, rising, the tokens t whose bit (t & 31) of `words[i, t >> 5]`
    is 1 (int32, on the host). At least one bit of each is set."""

    at: Sequence[int]
    words: npt.NDArray[np.int32]

    def binding(self, tokens: Tensor, rows: Sequence[RowSampling]) -> TokenMasks:
        """Without those of greedy rows whose likeliest token `tokens[i]` is allowed: they decide nothing."""
        likeliest = tokens[torch.tensor(self.at)].numpy()
        words = self.words.view(np.uint32)[np.arange(len(self.at)), likeliest >> 5]
        banned = (words >> (likeliest & 31).astype(np.uint32)) & 1 == 0
        kept = [j for j, i in enumerate(self.at) if banned[j] or not rows[i].greedy]
        return TokenMasks([self.at[j] for j in kept], self.words[kept])

    def applied(self, logits: Tensor) -> Tensor:
        """The rows `at`, copied, with -inf in place of what is not allowed. (Adding 0 or -inf, made from the
        bits by integer arithmetic, takes a tenth of the time of torch's masked fill.)"""
        packed = np.ascontiguousarray(self.words).view(np.uint8)
        bits = np.unpackbits(packed, axis=1, count=logits.shape[-1], bitorder="little")
        banned = torch.from_numpy(bits ^ 1).to(logits.device, non_blocking=True)
        bias = banned.int().mul_(_MINUS_INFINITY).view(torch.float32)
        return bias.add_(logits if len(self.at) == len(logits) else logits[list(self.at)])


def sample(
    logits: Tensor,
    rows: Sequence[RowSampling],
    positions: Sequence[int],
    history: Callable[[int], Tensor],
    masks: TokenMasks | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose a token for each row of float32 `logits` [n, vocabulary], which is left unchanged.

    `positions[i]` is where row i's new token goes; `history(i)` gives the tokens [positions[i]] before it.
    A mask has the last word: it knows of `min_new_tokens`, so no stop tokens are banned in its row.
    Returns tokens [n] int64 and whether each is usable [n] bool: not where the logits have a NaN or an
    infinity, or where every token is banned. The other rows are not affected.
    """
    usable = logits.sum(-1).isfinite()  # the fastest way to see one that is not
    adjusting = [i for i, row in enumerate(rows) if row.adjusts]
    masked = frozenset(masks.at) if masks is not None else frozenset()
    if adjusting:
        logits = logits.clone()
        for i in adjusting:
            _adjust(logits[i], rows[i], history(i), bans_stops=i not in masked)
    tokens = _likeliest(logits)
    if adjusting:
        usable &= logits.gather(-1, tokens[:, None])[:, 0].isfinite()
    bounded: dict[int, Tensor] = {}  # masked logits, by row
    if masks is not None:
        masks = masks.binding(tokens, rows) if logits.device.type == "cpu" else masks
        if masks.at:
            values, at = masks.applied(logits), torch.tensor(masks.at, device=logits.device)
            tokens[at] = best = _likeliest(values)
            usable[at] &= values.gather(-1, best[:, None])[:, 0].isfinite()
            bounded = dict(zip(masks.at, values, strict=True))
    for filtered in (False, True):
        chosen = [i for i, row in enumerate(rows) if not row.greedy and row.filters == filtered]
        if not chosen:
            continue
        index = torch.tensor(chosen, device=logits.device)
        temperatures = torch.tensor([rows[i].params.temperature for i in chosen], device=logits.device)
        values = logits[index]
        for j, i in enumerate(chosen):
            if i in bounded:
                values[j] = bounded[i]
        probs = torch.softmax(values / temperatures[:, None], -1)
        u = uniform(
            torch.tensor([rows[i].seed for i in chosen], device=logits.device),
            torch.tensor([positions[i] for i in chosen], device=logits.device),
        )
        if filtered:
            picks = [_pick_filtered(p, x, rows[i].params) for p, x, i in zip(probs, u, chosen, strict=True)]
            tokens[index] = torch.cat(picks)
        else:
            tokens[index] = _pick(probs, u)
    return tokens, usable


def _likeliest(logits: Tensor) -> Tensor:
    """Index [n] of the largest of each row. (On a CPU numpy finds it in a tenth of torch's time.)"""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def _adjust(logits: Tensor, row: RowSampling, history: Tensor, *, bans_stops: bool) -> None:
    """Apply penalties, bias and bans to one row of logits in place."""
    params, outputs = row.params, history[row.prompt_len :]
    if params.repetition_penalty != 1.0:
        seen = history.long().unique()
        values = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if params.frequency_penalty or params.presence_penalty:
        seen, counts = outputs.long().unique(return_counts=True)
        logits[seen] -= counts * params.frequency_penalty + params.presence_penalty
    if params.logit_bias:
        logits[row.bias_ids] += row.bias_values
    if bans_stops and len(outputs) < params.min_new_tokens:
        logits[row.stop_ids] = float("-inf")


def _pick(probs: Tensor, u: Tensor) -> Tensor:
    """Invert the cumulative distribution of each row: [n, m], [n] -> [n] indices. Sums in float64."""
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    target = u * cumulative[:, -1]
    index = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    return index.clamp_(max=probs.shape[-1] - 1)  # only a row with NaN gets there


def _pick_filtered(probs: Tensor, u: Tensor, params: SamplingParams) -> Tensor:
    """One row [vocabulary] -> [1] token. All three filters keep a run of the most likely tokens."""
    size = probs.shape[0]
    count = params.top_k if 0 < params.top_k < size else size
    top, ids = probs.topk(min(count, _CANDIDATES))
    if count > _CANDIDATES and not _covers(top, params):
        top, ids = (t[:count] for t in probs.sort(descending=True, stable=True))
    before = top.cumsum(0, dtype=torch.float64) - top
    kept = (before <= params.top_p) & (top >= top[0] * params.min_p)
    return ids[_pick(torch.where(kept, top, 0.0)[None], u[None])]


def _covers(top: Tensor, params: SamplingParams) -> bool:
    """Whether the filters end inside these candidates."""
    return bool(top[-1] < top[0] * params.min_p) or bool(
        top.sum(dtype=torch.float64) - top[-1] > params.top_p
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
