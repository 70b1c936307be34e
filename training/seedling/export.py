"""Write the averaged weights of a training checkpoint as a Hugging Face folder in bf16."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from .model import Seedling, SeedlingConfig
from .train import ASSETS, Checkpoint


def hf_config(config: SeedlingConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """``config.json`` of a ``Qwen3ForCausalLM``."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "max_window_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Greedy by default: every task of the model has one right answer."""
    stop = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    return {"do_sample": False, "eos_token_id": stop, "pad_token_id": stop[1]}


def export(checkpoint: Path, folder: Path, tokenizer: Tokenizer) -> int:
    """Write weights and configs; returns the number of parameters."""
    state = Checkpoint(checkpoint)
    config = SeedlingConfig(**json.loads(state.facts.read_text())["config"])
    stored = load_file(state.tensors)
    names = [name for name, _ in Seedling(config).named_parameters()]
    weights = {name: stored["e." + name].to(torch.bfloat16).contiguous() for name in names}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(config, tokenizer), indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation_config(tokenizer), indent=2) + "\n")
    return sum(tensor.numel() for tensor in weights.values())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("build/seedling"))
    parser.add_argument("--out", type=Path, default=ASSETS)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(ASSETS / "tokenizer.json"))
    count = export(args.checkpoint, args.out, tokenizer)
    size = (args.out / "model.safetensors").stat().st_size
    print(f"{count} parameters, {size / 1e6:.1f} MB in {args.out / 'model.safetensors'}")


if __name__ == "__main__":
    main()
