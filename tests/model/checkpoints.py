"""Tiny random checkpoints of every family, made with transformers, which is also what parity is judged by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

SIZES: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,  # large enough that logits differ and attention is not uniform
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 512,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
QWEN_WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 33, "max_window_layers": 1}


def _config(kind: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    return kind(**{**SIZES, **changes})


FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": _config(LlamaConfig, tie_word_embeddings=False),
    "llama3-tied": _config(LlamaConfig, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "llama-linear-bias": _config(LlamaConfig, rope_parameters=LINEAR, attention_bias=True, mlp_bias=True),
    "llama-yarn": _config(LlamaConfig, rope_parameters=YARN, num_key_value_heads=6),
    "llama-gelu": _config(LlamaConfig, hidden_act="gelu"),
    "mistral-gelu-tanh": _config(MistralConfig, hidden_act="gelu_pytorch_tanh", sliding_window=None),
    "mistral": _config(MistralConfig, sliding_window=40, head_dim=16),
    "qwen2": _config(Qwen2Config, tie_word_embeddings=True),
    "qwen2-window": _config(Qwen2Config, num_key_value_heads=1, **QWEN_WINDOW),
    "qwen3": _config(Qwen3Config, head_dim=16, tie_word_embeddings=True),
    "qwen3-untied": _config(Qwen3Config, head_dim=32, num_key_value_heads=6, attention_bias=True),
}


def make_checkpoint(name: str, folder: Path, seed: int = 0) -> PreTrainedModel:
    """Save a random model of the family into `folder` and return it, in evaluation mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[name], dtype=torch.float32)
    with torch.no_grad():  # transformers starts norms at one and biases at zero, which would hide mistakes
        for key, value in model.named_parameters():
            if key.endswith(("norm.weight", "bias")):
                value.add_(torch.randn_like(value) * 0.2)
    model.save_pretrained(folder)
    return model.eval()
