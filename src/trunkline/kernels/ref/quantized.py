"""Products of whole numbers in plain torch: what `Quantization` promises, spelled out.

Sums of whole numbers are exact in float64, so nothing depends on the order; groups are added in order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.kernels.ops import PackedLinear, Quantization


def quantize_weight(weight: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """[out, in] -> whole numbers int8 [out, groups, inputs of a group], scales float32 [out, groups].

    Raises ValueError where a weight is not finite, or too large for a float16 scale."""
    parts = _in_groups(weight.float(), quantization)
    most = parts.abs().amax(-1, keepdim=True)
    if quantization.bits == 8:
        scales = most[..., 0] / 127
        levels = _to_bytes(parts)
    else:
        first = (parts.abs() == most).int().argmax(-1, keepdim=True)  # of equals the first, with its sign
        scales = (parts.gather(-1, first)[..., 0] / -8).half().float()
        factor = torch.where(scales != 0, 1 / scales, 0)
        levels = (parts * factor[..., None]).round().clamp_(-8, 7)
    if not (most.isfinite().all() and scales.isfinite().all()):
        raise ValueError("a weight is not finite, or too large for float16 scales")
    return levels.to(torch.int8), scales


def quantized_product(x: Tensor, packed: PackedLinear) -> Tensor:
    """[T, in] -> [T, out] float32, without bias."""
    quantization, scales = packed.quantization, packed.scales
    assert quantization is not None and scales is not None
    parts = _in_groups(x.float(), quantization)
    rounded = _to_bytes(parts)
    x_scales = parts.abs().amax(-1) / 127
    x_scales = torch.where(x_scales.isfinite(), x_scales, torch.nan)
    total = torch.zeros(x.shape[0], packed.data.shape[0], device=x.device)
    for g in range(parts.shape[1]):
        sums = rounded[:, g].double() @ packed.data[:, g].double().T
        total += sums.float() * (scales[:, g] * x_scales[:, g, None])
    return total


def dequantize(packed: PackedLinear, rows: Tensor) -> Tensor:
    """Rows [n] of the weight as float32 [n, in]."""
    assert packed.scales is not None
    wide = packed.data[rows].float() * packed.scales[rows][..., None]
    return wide.flatten(1)[:, : packed.in_features]


def _in_groups(x: Tensor, quantization: Quantization) -> Tensor:
    """[n, in] -> [n, groups, inputs of a group], zeros at the end."""
    size = quantization.group or x.shape[1]
    return F.pad(x, (0, -x.shape[1] % size)).unflatten(1, (-1, size))


def _to_bytes(parts: Tensor) -> Tensor:
    """To -127..127 by the largest magnitude along the last dimension; zeros where one is not finite."""
    most = parts.abs().amax(-1, keepdim=True)
    factor = torch.where(most > 0, torch.full_like(most, 127) / most, 0)  # `127 / most` rounds twice
    return torch.where(most.isfinite(), parts * factor, 0).round()


def quantize_kv(kv: Tensor) -> Tensor:
    """[..., D] -> int8 [..., D + 2]: what `head_width` describes."""
    wide = kv.float()
    scales = (wide.abs().amax(-1, keepdim=True) / 127).bfloat16()
    scales = scales.where(wide.isfinite().all(-1, keepdim=True), float("nan"))
    levels = (wide / scales.float()).round_().clamp_(-127, 127).where(scales > 0, 0.0).to(torch.int8)
    return torch.cat((levels, scales.view(torch.int8)), -1)


def dequantize_kv(stored: Tensor) -> Tensor:
    """int8 [..., D + 2] -> float32 [..., D]."""
    return stored[..., :-2].float() * stored[..., -2:].contiguous().view(torch.bfloat16).float()
