"""RMS norm with a learned gain."""

from __future__ import annotations

from torch import Tensor

from trunkline.kernels.ops import Kernels


class RMSNorm:
    def __init__(self, kernels: Kernels, weight: Tensor, eps: float) -> None:
        """`weight` broadcasts against the input: [n], or [heads, n] for one gain per head."""
        self.weight = weight
        self.eps = eps
        self._norm = kernels.rms_norm

    def __call__(self, x: Tensor) -> Tensor:
        return self._norm(x, self.weight, self.eps)
