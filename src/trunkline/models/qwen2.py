"""Qwen 2 and 2.5: Llama's block with a bias on queries, keys and values."""

from __future__ import annotations

from trunkline.config.model_spec import ModelSpec
from trunkline.models.decoder import DecoderLayer, dense_layer
from trunkline.models.weights import LayerLoader


def layer(load: LayerLoader, spec: ModelSpec) -> DecoderLayer:
    return dense_layer(load, spec, qkv_bias=True)
