"""Machines and model descriptions for tests of the configuration."""

from __future__ import annotations

from typing import Any

from trunkline.config.hardware import Gpu, Hardware
from trunkline.config.model_spec import ModelSpec

GIB = 1 << 30
MACHINE = Hardware(
    cpu_name="test CPU",
    cores=2,
    cpu_flags=("avx2", "avx512f"),
    total_bytes=16 * GIB,
    available_bytes=12 * GIB,
    torch_version="2.13.0+cpu",
)
BF16_MACHINE = Hardware(
    cores=2,
    cpu_flags=("avx2", "avx512f", "avx512_bf16"),
    total_bytes=16 * GIB,
    available_bytes=12 * GIB,
    torch_version="2.13.0+cpu",
)
GPU_MACHINE = Hardware(
    cores=16,
    total_bytes=128 * GIB,
    available_bytes=100 * GIB,
    gpus=(Gpu("Test GPU", 80 * GIB, 79 * GIB, 9.0),),
    torch_version="2.13.0",
)


def spec(**changes: Any) -> ModelSpec:
    """The shape of Qwen3-0.6B with a context of 4,096, or a change of it."""
    values: dict[str, Any] = {
        "architecture": "Qwen3ForCausalLM",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_layers": 28,
        "num_heads": 16,
        "num_kv_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": None,
        "tie_embeddings": True,
        "attention_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        "qk_norm": True,
        "layer_windows": (None,) * 28,
        "max_position": 4096,
        "eos_token_ids": (151645,),
        "bos_token_id": None,
        "dtype": "bfloat16",
        "path": "/models/qwen",
        "generation_defaults": {},
    }
    return ModelSpec(**(values | changes))
