"""Linear, norm, rope, activation, embedding, KV store: everything but attention, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.kernels.ops import PackedLinear

# Rows that oneDNN is told to expect when it chooses the packed layout; results do not depend on it.
_PACK_ROWS = 64


def supports_linear(dtype: torch.dtype, device: torch.device) -> bool:
    """Ask by doing: oneDNN refuses to pack a dtype that the CPU can't multiply."""
    if device.type != "cpu" or dtype == torch.float32:
        return True
    try:
        packed = pack_linear(torch.ones(16, 16, dtype=dtype), None)
        return bool(linear(torch.ones(1, 16, dtype=dtype), packed)[0, 0] == 16)
    except RuntimeError:
        return False


def pack_linear(weight: Tensor, bias: Tensor | None) -> PackedLinear:
    """On a CPU the weight becomes oneDNN's blocked layout, which is used for every number of rows.

    Each output is then one running sum over the inputs, whatever the number of rows; torch's own `linear`
    switches kernels (and bits) with it.
    """
    out_features, in_features = weight.shape
    data = weight
    if weight.device.type == "cpu":
        data = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)
    return PackedLinear(data, bias, in_features, out_features, weight.numel() * weight.element_size())


def linear(x: Tensor, packed: PackedLinear) -> Tensor:
    if x.device.type == "cpu":
        return torch.ops.mkldnn._linear_pointwise.default(x, packed.data, packed.bias, "none", [], "")
    return F.linear(x, packed.data, packed.bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    squares = wide.square().sum(-1, keepdim=True)  # `mean` takes twice the time on a row
    normed = wide * squares.mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return (normed if x.dtype == torch.float32 else normed.to(x.dtype)).mul_(weight)


def rope(x: Tensor, table: Tensor, out: Tensor) -> Tensor:
    tokens, heads, dim = x.shape
    cos, sin = table[:, None, 0], table[:, None, 1]
    swapped = x.unflatten(-1, (2, dim // 2)).flip(2).view(tokens, heads, dim)
    if x.dtype == torch.float32:
        return torch.add(x * cos, swapped * sin, out=out)
    return out.copy_(x * cos + swapped * sin)


def silu_gate(x: Tensor) -> Tensor:
    """Spelled with `exp`: torch's `silu` computes the last elements of a thread's share by other code, so its
    bits depend on where a row lies in the batch."""
    gate, up = x.chunk(2, dim=-1)
    wide = gate.float()
    result = wide.neg().exp_().add_(1)
    torch.div(wide, result, out=result)
    return result.mul_(up).to(x.dtype)


def embedding(token_ids: Tensor, table: Tensor) -> Tensor:
    return table.index_select(0, token_ids)


def store_kv(pool: Tensor, slots: Tensor, kv: Tensor) -> None:
    pool.index_copy_(0, slots, kv)
