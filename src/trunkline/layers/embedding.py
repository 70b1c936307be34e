"""Token embedding and the output head."""

from __future__ import annotations

from torch import Tensor

from trunkline.kernels.ops import Choices, Kernels, Quantization, TokenMasks
from trunkline.layers.linear import Linear


class OutputHead:
    """Hidden states to float32 logits. With 8 bits if the model has 8 or 4: it decides most."""

    def __init__(self, kernels: Kernels, weight: Tensor, quantization: Quantization | None = None) -> None:
        self.linear = Linear(kernels, [weight], [], Quantization(8) if quantization else None)
        self._top = kernels.top

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """[n, hidden] -> [n, vocabulary] float32."""
        return self.linear(x, wide=True, out=out)

    def top(
        self, x: Tensor, masks: TokenMasks | None = None, choices: Choices | None = None
    ) -> tuple[Tensor, Tensor]:
        """[n, hidden] -> a token for each row [n] int64, and whether it is usable [n] bool; logits are not
        kept. See `Kernels.top`."""
        return self._top(x, self.linear.packed, masks, choices)


class Embedding:
    """Look-ups of token ids. `head`: the output head if it holds the same weight (tied)."""

    def __init__(self, kernels: Kernels, weight: Tensor, head: OutputHead | None) -> None:
        packed = None if head is None else head.linear.packed
        self.table = kernels.embedding_table(weight, packed)
        self.nbytes = weight.nbytes if self.table is weight else 0
        self._embedding = kernels.embedding

    def __call__(self, token_ids: Tensor) -> Tensor:
        """[T] -> [T, hidden]."""
        return self._embedding(token_ids, self.table)
