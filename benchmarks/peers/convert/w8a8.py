"""`python -m benchmarks.peers.convert.w8a8 MODEL OUT`: int8 weights as vLLM loads them.

The compressed-tensors format: one scale for each output channel of a linear layer, activations quantised for
each token as they come. Embedding and output head stay bf16.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**INT8, "strategy": "token", "dynamic": True},
        }
    },
}


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 of (out, in), and the scales (out, 1)."""
    scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
    return (weight.float() / scale).round().to(torch.int8), scale.to(weight.dtype)


def convert(model: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for file in model.iterdir():
        if file.is_file() and not file.name.startswith("model"):
            shutil.copy(file, target)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                tensors[name] = opened.get_tensor(name)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name], tensors[name + "_scale"] = quantize(tensors[name])
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTIZATION}, indent=2))


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
