"""Kernels in plain torch: the oracle for faster ones, and what runs where there are none."""

from __future__ import annotations

from trunkline.kernels.ref.choose import choose, top
from trunkline.kernels.ref.dense import (
    embedding,
    embedding_table,
    gated_linear,
    layer_stack,
    linear,
    pack_gated,
    pack_linear,
    rms_norm,
    rope,
    store_kv,
    supports_linear,
)
from trunkline.kernels.ref.paged_attention import attention, plan_attention
from trunkline.kernels.ref.quantized import dequantize

__all__ = [
    "attention",
    "choose",
    "dequantize",
    "embedding",
    "embedding_table",
    "gated_linear",
    "layer_stack",
    "linear",
    "pack_gated",
    "pack_linear",
    "plan_attention",
    "rms_norm",
    "rope",
    "store_kv",
    "supports_linear",
    "top",
]
