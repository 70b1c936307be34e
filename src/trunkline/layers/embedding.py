"""Token embedding and the output head."""

from __future__ import annotations

from torch import Tensor

from trunkline.kernels.ops import Kernels
from trunkline.layers.linear import Linear


class Embedding:
    def __init__(self, kernels: Kernels, table: Tensor) -> None:
        self.table = table  # [vocabulary, hidden]
        self._embedding = kernels.embedding

    def __call__(self, token_ids: Tensor) -> Tensor:
        """[T] -> [T, hidden]."""
        return self._embedding(token_ids, self.table)


class OutputHead:
    """Hidden states to float32 logits.

    A tied head packs the embedding table once more: a row-major table serves look-ups, a blocked one serves
    products. The memory plan counts both.
    """

    def __init__(self, kernels: Kernels, weight: Tensor) -> None:
        self.linear = Linear(kernels, [weight], [])

    def __call__(self, x: Tensor) -> Tensor:
        """[n, hidden] -> [n, vocabulary] float32."""
        return self.linear(x).float()
