"""Rotary position embedding: frequencies of each scaling type, and the table that steps look up."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trunkline.config.model_spec import ModelSpec, RopeScaling


class RopeTable:
    """Cosines and signed sines of every position up to the context limit, in float32."""

    def __init__(self, spec: ModelSpec, max_context: int, device: torch.device) -> None:
        frequencies, scale = rope_frequencies(spec)
        angles = torch.arange(max_context, dtype=torch.float32)[:, None] * frequencies
        cos, sin = angles.cos() * scale, angles.sin() * scale
        table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), dim=1)
        self.table = table.to(device)  # [max_context, 2, head_dim]

    def __call__(self, positions: Tensor) -> Tensor:
        """[T] -> [T, 2, head_dim], as the `rope` op wants it."""
        return self.table.index_select(0, positions)


def rope_frequencies(spec: ModelSpec) -> tuple[Tensor, float]:
    """Angle per position [head_dim / 2] float32, and a factor on sines and cosines."""
    steps = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
    base = 1.0 / spec.rope_theta**steps
    scaling = spec.rope_scaling
    if scaling is None:
        return base, 1.0
    if scaling.kind == "linear":
        return base / scaling["factor"], 1.0
    if scaling.kind == "llama3":
        return _llama3(base, scaling), 1.0
    return _yarn(base, scaling, spec)


def _llama3(base: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / base
    scaled = torch.where(wavelength > context / low, base / factor, base)
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * scaled / factor + smooth * scaled
    is_between = (wavelength >= context / high) & (wavelength <= context / low)
    return torch.where(is_between, between, scaled)


def _yarn(base: Tensor, scaling: RopeScaling, spec: ModelSpec) -> tuple[Tensor, float]:
    """YaRN (Peng et al., 2023): interpolate slow dimensions, keep fast ones, ramp between them."""
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]
    dim = spec.head_dim

    def dimension(rotations: float) -> float:
        """The dimension that turns `rotations` times over the original context."""
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(spec.rope_theta))

    low = dimension(scaling.get("beta_fast") or 32.0)
    high = dimension(scaling.get("beta_slow") or 1.0)
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    kept = 1 - ramp.clamp(0, 1)
    attention = scaling.get("attention_factor")
    if attention is None:
        attention = _yarn_scale(factor, 1.0)
        mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if mscale and all_dim:
            attention = _yarn_scale(factor, mscale) / _yarn_scale(factor, all_dim)
    return base / factor * (1 - kept) + base * kept, attention


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
