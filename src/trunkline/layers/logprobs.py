"""Log-probabilities of the model's own distribution: natural log, before any change that sampling makes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trunkline.types import LogprobParams, TokenLogprobs


@dataclass(frozen=True)
class Logprobs:
    """Results for n positions of one request, on the device until `to_host` is called."""

    tokens: Tensor  # [n]
    own: Tensor  # [n] float32
    top_values: Tensor  # [n, top_n]
    top_ids: Tensor  # [n, top_n]
    chosen: Tensor  # [n, len(token_ids)]
    chosen_ids: tuple[int, ...]

    def to_host(self) -> list[TokenLogprobs]:
        rows = zip(
            self.tokens.tolist(),
            self.own.tolist(),
            self.top_values.tolist(),
            self.top_ids.tolist(),
            self.chosen.tolist(),
            strict=True,
        )
        return [
            TokenLogprobs(
                token,
                own,
                list(zip(ids, values, strict=True)),
                list(zip(self.chosen_ids, chosen, strict=True)),
            )
            for token, own, values, ids, chosen in rows
        ]


def logprobs_of(logits: Tensor, tokens: Tensor, wanted: LogprobParams) -> Logprobs:
    """`logits` [n, vocabulary] float32, `tokens` [n]: what `wanted` asks for at each position."""
    table = torch.log_softmax(logits, -1)
    tokens = tokens.long()
    top_values, top_ids = table.topk(min(wanted.top_n, table.shape[-1]), dim=-1)
    chosen = table[:, torch.tensor(wanted.token_ids, dtype=torch.int64, device=table.device)]
    own = table.gather(-1, tokens[:, None])[:, 0]
    return Logprobs(tokens, own, top_values, top_ids, chosen, wanted.token_ids)
