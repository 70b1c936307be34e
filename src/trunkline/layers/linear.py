"""Linear layers over packed weights."""

from __future__ import annotations

from torch import Tensor

from trunkline.kernels.ops import Activation, Kernels, Quantization


class Linear:
    """x @ weight.T + bias. Several weights with the same input are one product: pass them together."""

    def __init__(
        self,
        kernels: Kernels,
        weights: list[Tensor],
        biases: list[Tensor],
        quantization: Quantization | None = None,
    ) -> None:
        """`weights` [out_i, in] are joined along `out`; `biases` is empty or has one entry for each.

        Raises ValueError if a weight that must be rounded is not finite."""
        self.packed = kernels.pack_linear(weights, biases, quantization)
        self._linear = kernels.linear

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, wide: bool = False, out: Tensor | None = None
    ) -> Tensor:
        """[T, in] -> [T, sum of out_i], plus `residual` of that shape; in float32 if `wide`."""
        return self._linear(x, self.packed, residual, wide, out)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes


class GatedLinear:
    """activation(x @ gate.T) * (x @ up.T), in one product."""

    def __init__(
        self,
        kernels: Kernels,
        gate: Tensor,
        up: Tensor,
        biases: list[Tensor],
        quantization: Quantization | None = None,
        activation: Activation = "silu",
    ) -> None:
        self.packed = kernels.pack_gated(gate, up, biases, quantization, activation)
        self._linear = kernels.gated_linear

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        return self._linear(x, self.packed)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes
