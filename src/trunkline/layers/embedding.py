"""Token embedding and the output head."""

from __future__ import annotations

from torch import Tensor

from trunkline.kernels.ops import Kernels
from trunkline.layers.linear import Linear


class OutputHead:
    """Hidden states to float32 logits."""

    def __init__(self, kernels: Kernels, weight: Tensor) -> None:
        self.linear = Linear(kernels, [weight], [])

    def __call__(self, x: Tensor) -> Tensor:
        """[n, hidden] -> [n, vocabulary] float32."""
        return self.linear(x, wide=True)


class Embedding:
    """Look-ups of token ids. `head`: the output head if it holds the same weight (tied)."""

    def __init__(self, kernels: Kernels, weight: Tensor, head: OutputHead | None) -> None:
        packed = None if head is None else head.linear.packed
        self.table = kernels.embedding_table(weight, packed)
        self.nbytes = 0 if packed is not None and self.table is packed else weight.nbytes
        self._embedding = kernels.embedding

    def __call__(self, token_ids: Tensor) -> Tensor:
        """[T] -> [T, hidden]."""
        return self._embedding(token_ids, self.table)
