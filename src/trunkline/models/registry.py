"""Which file builds which architecture. `ARCHITECTURES` of the model spec has the same names, torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from trunkline.config.model_spec import ModelSpec
from trunkline.kernels.ops import Kernels, Quantization
from trunkline.models import llama, mistral, qwen2, qwen3
from trunkline.models.decoder import DecoderLayer, DecoderModel, load_decoder
from trunkline.models.weights import LayerLoader

LAYERS: Mapping[str, Callable[[LayerLoader, ModelSpec], DecoderLayer]] = MappingProxyType(
    {
        "LlamaForCausalLM": llama.layer,
        "MistralForCausalLM": mistral.layer,
        "Qwen2ForCausalLM": qwen2.layer,
        "Qwen3ForCausalLM": qwen3.layer,
    }
)


def load_model(
    spec: ModelSpec,
    kernels: Kernels,
    dtype: torch.dtype,
    device: torch.device,
    max_context: int,
    quantization: Quantization | None = None,
) -> DecoderModel:
    """Raises ModelError for a checkpoint that does not fit the spec."""
    layer = LAYERS[spec.architecture]
    return load_decoder(spec, layer, kernels, dtype, device, max_context, quantization)
