"""Linear, norm, rope, activation, embedding, KV store: everything but attention, in plain torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.kernels.ops import (
    Activation,
    LayerWeights,
    PackedLinear,
    Quantization,
    TokenMasks,
    by_token,
)
from trunkline.kernels.ref.quantized import dequantize, quantize_kv, quantize_weight, quantized_product

# Rows that oneDNN is told to expect when it chooses the packed layout; results do not depend on it.
_PACK_ROWS = 64
# Inputs that one oneDNN product sums. Beyond 1,024 its AVX-512 kernels cut the sum into blocks, and where
# they cut depends on the number of rows (float32 from 1,025 inputs on; bfloat16 for some output sizes).
_MOST_INPUTS = 1024
_MINUS_INFINITY = -(1 << 23)  # float32's bits, as an int32


def supports_linear(dtype: torch.dtype, device: torch.device) -> bool:
    """Ask by doing: oneDNN refuses to pack a dtype that the CPU can't multiply."""
    if device.type != "cpu" or dtype == torch.float32:
        return True
    try:
        packed = pack_linear([torch.ones(16, 16, dtype=dtype)], [])
        return bool(linear(torch.ones(1, 16, dtype=dtype), packed)[0, 0] == 16)
    except RuntimeError:
        return False


def pack_linear(
    weights: Sequence[Tensor], biases: Sequence[Tensor], quantization: Quantization | None = None
) -> PackedLinear:
    """On a CPU the weight becomes oneDNN's blocked layout, which is used for every number of rows.

    Each output is then one running sum over the inputs, or one over each `_MOST_INPUTS` of them, whatever the
    number of rows; torch's own `linear` switches kernels (and bits) with it.
    """
    weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
    out_features, in_features = weight.shape
    bias = torch.cat(list(biases)) if biases else None
    if quantization is not None:
        levels, scales = quantize_weight(weight, quantization)
        size = levels.nbytes + scales.nbytes
        return PackedLinear(
            levels, bias, in_features, out_features, size, quantization=quantization, scales=scales
        )
    data: Tensor | list[Tensor] = weight
    size = weight.nbytes
    if weight.device.type == "cpu":
        # On tiles (AMX) the order of oneDNN's sums depends on the number of rows, so float32 does them there.
        exact = weight.float() if torch.cpu._is_amx_tile_supported() else weight
        parts = exact.split(_MOST_INPUTS, dim=1)
        data = [torch.ops.mkldnn._reorder_linear_weight(part.contiguous(), _PACK_ROWS) for part in parts]
        bias = None if bias is None else bias.to(exact.dtype)
        size = exact.nbytes
    return PackedLinear(data, bias, in_features, out_features, size)


def pack_gated(
    gate: Tensor,
    up: Tensor,
    biases: Sequence[Tensor],
    quantization: Quantization | None = None,
    activation: Activation = "silu",
) -> PackedLinear:
    both = pack_linear([gate, up], biases, quantization)
    return dataclasses.replace(both, out_features=len(gate), gated=True, activation=activation)


def linear(
    x: Tensor,
    packed: PackedLinear,
    residual: Tensor | None = None,
    wide: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    result = _linear(x, packed, residual, wide)
    return result if out is None else out.copy_(result)


def _linear(x: Tensor, packed: PackedLinear, residual: Tensor | None, wide: bool) -> Tensor:
    if packed.quantization is not None:
        return _quantized(x, packed, residual, wide)
    if x.device.type == "cpu":
        out = _blocked_product(x, packed)
    else:
        out = F.linear(x, packed.data, packed.bias)
    if residual is not None:
        out = out + residual
    return out.float() if wide else out


def _quantized(x: Tensor, packed: PackedLinear, residual: Tensor | None, wide: bool) -> Tensor:
    out = quantized_product(x, packed)
    if packed.bias is not None:
        out += packed.bias
    if residual is not None:
        out += residual
    return out if wide else out.to(x.dtype)


def masked(logits: Tensor, masks: TokenMasks) -> Tensor:
    """The rows `at`, copied, with -inf in place of what is not allowed. (Adding 0 or -inf, made from the bits
    by integer arithmetic, takes a tenth of the time of torch's masked fill.)"""
    packed = np.ascontiguousarray(masks.words).view(np.uint8)
    bits = np.unpackbits(packed, axis=1, count=logits.shape[-1], bitorder="little")
    banned = torch.from_numpy(bits ^ 1).to(logits.device, non_blocking=True)
    bias = banned.int().mul_(_MINUS_INFINITY).view(torch.float32)
    return bias.add_(logits if len(masks.at) == len(logits) else logits[list(masks.at)])


def _blocked_product(x: Tensor, packed: PackedLinear) -> Tensor:
    """Parts in order, added in float32 (a bfloat16 part comes rounded from oneDNN)."""
    product = torch.ops.mkldnn._linear_pointwise.default
    inputs = x.to(packed.data[0].dtype)
    first, *others = zip(inputs.split(_MOST_INPUTS, dim=1), packed.data, strict=True)
    out: Tensor = product(*first, packed.bias, "none", [], "")
    if not others:
        return out.to(x.dtype)
    total = out.float()
    for part, weight in others:
        total += product(part, weight, None, "none", [], "")
    return total.to(x.dtype)


def gated_linear(x: Tensor, packed: PackedLinear) -> Tensor:
    both = linear(x, packed, wide=packed.quantization is not None)
    return apply_gate(both, packed.activation).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    squares = wide.square().sum(-1, keepdim=True)  # `mean` takes twice the time on a row
    normed = wide * squares.mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return (normed if x.dtype == torch.float32 else normed.to(x.dtype)).mul_(weight)


def rope(x: Tensor, table: Tensor, gain: Tensor | None = None, eps: float = 0.0) -> None:
    tokens, heads, dim = x.shape
    cos, sin = table[:, None, 0], table[:, None, 1]
    normed = x if gain is None else rms_norm(x, gain, eps)
    swapped = normed.unflatten(-1, (2, dim // 2)).flip(2).view(tokens, heads, dim)
    x.copy_(normed * cos + swapped * sin)


def apply_gate(x: Tensor, activation: Activation) -> Tensor:
    """[T, 2n] = (gate, up) -> [T, n]: activation(gate) * up.

    Spelled with `exp` and `erfc`: torch's `silu` and `gelu` compute the last elements of a thread's share by
    other code, so their bits depend on where a row lies in the batch.
    """
    gate, up = x.chunk(2, dim=-1)
    wide = gate.float()
    if activation == "gelu":
        result = (wide * -(0.5**0.5)).erfc_().mul_(0.5).mul_(wide)
    else:
        inner = wide.neg()
        if activation == "gelu_tanh":
            inner.mul_(wide.square().mul_(0.044715).add_(1)).mul_(2 * (2 / math.pi) ** 0.5)
        result = inner.exp_().add_(1)
        torch.div(wide, result, out=result)
    return result.mul_(up).to(x.dtype)


def embedding_table(weight: Tensor, head: PackedLinear | None) -> Tensor | QuantizedTable:
    if head is not None and head.quantization is not None:
        return QuantizedTable(head, weight.dtype)
    return weight


@dataclass(frozen=True)
class QuantizedTable:
    """An embedding that is the rounded output head; rows come out in `dtype`."""

    head: PackedLinear
    dtype: torch.dtype


def embedding(token_ids: Tensor, table: Tensor | QuantizedTable) -> Tensor:
    if isinstance(table, QuantizedTable):
        return dequantize(table.head, token_ids).to(table.dtype)
    return table.index_select(0, token_ids)


def layer_stack(layers: Sequence[LayerWeights], heads: int, kv_heads: int, eps: float) -> None:
    """Nothing is gained by it here."""


def store_kv(pool: Tensor, slots: Tensor, kv: Tensor) -> None:
    tokens = by_token(pool)
    page_size = tokens.shape[1]
    rows = quantize_kv(kv) if pool.dtype == torch.int8 else kv.to(pool.dtype)
    tokens[slots // page_size, slots % page_size] = rows
