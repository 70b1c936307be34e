"""Kernels in plain torch: the oracle for faster ones, and what runs where there are none."""

from __future__ import annotations

from trunkline.kernels.ref.dense import (
    embedding,
    linear,
    pack_linear,
    rms_norm,
    rope,
    silu_gate,
    store_kv,
    supports_linear,
)
from trunkline.kernels.ref.paged_attention import attention, plan_attention

__all__ = [
    "attention",
    "embedding",
    "linear",
    "pack_linear",
    "plan_attention",
    "rms_norm",
    "rope",
    "silu_gate",
    "store_kv",
    "supports_linear",
]
