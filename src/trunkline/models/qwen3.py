"""Qwen 3, dense: Llama's block with an RMS norm on each query and key head."""

from __future__ import annotations

from trunkline.config.model_spec import ModelSpec
from trunkline.models.decoder import DecoderLayer, dense_layer
from trunkline.models.weights import LayerLoader


def layer(load: LayerLoader, spec: ModelSpec) -> DecoderLayer:
    return dense_layer(load, spec, qkv_bias=spec.attention_bias, output_bias=spec.output_bias, head_norm=True)
