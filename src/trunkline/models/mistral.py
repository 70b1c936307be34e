"""Mistral: Llama's block without biases; the sliding window comes with the spec."""

from __future__ import annotations

from trunkline.config.model_spec import ModelSpec
from trunkline.models.decoder import DecoderLayer, dense_layer
from trunkline.models.weights import LayerLoader


def layer(load: LayerLoader, spec: ModelSpec) -> DecoderLayer:
    return dense_layer(load, spec)
