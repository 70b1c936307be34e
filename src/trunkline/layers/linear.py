"""A linear layer over a packed weight."""

from __future__ import annotations

import torch
from torch import Tensor

from trunkline.kernels.ops import Kernels


class Linear:
    """x @ weight.T + bias. Several weights with the same input are one product: pass them together."""

    def __init__(self, kernels: Kernels, weights: list[Tensor], biases: list[Tensor]) -> None:
        """`weights` [out_i, in] are joined along `out`; `biases` is empty or has one entry for each."""
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.packed = kernels.pack_linear(weight, torch.cat(biases) if biases else None)
        self._linear = kernels.linear

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, sum of out_i]."""
        return self._linear(x, self.packed)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes
