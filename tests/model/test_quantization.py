"""Rounded weights through the whole engine: bit-equal under every setting, close to the model itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model.conftest import Checkpoints
from tests.model.engine import admit, engine_config, make_core, make_worker, plan, run
from trunkline.config.model_spec import ModelError
from trunkline.config.schema import EngineConfig
from trunkline.messages import AddRequest
from trunkline.types import LogprobParams, SamplingParams

ROUNDED = [("int8", 32), ("int4", 32), ("int4", 128)]
SETTINGS: list[dict[str, Any]] = [
    {"step_tokens": 7},
    {"page_size": 1, "depth": 2},
    {"prefix_cache": False, "step_tokens": 24},
]


def rounded(folder: Path, how: str, group: int, **settings: Any) -> EngineConfig:
    config = engine_config(folder, **{"page_size": 8, "num_pages": 200, **settings})
    model = msgspec.structs.replace(config.model, quantization=how, quantization_group=group)
    return msgspec.structs.replace(config, model=model)


def requests() -> list[AddRequest]:
    generator = torch.Generator().manual_seed(0)
    return [
        AddRequest(
            rid=f"r{i}",
            token_ids=torch.randint(0, 300, (5 + 17 * i,), generator=generator).tolist(),
            params=SamplingParams(
                temperature=i % 2 * 0.8, max_new_tokens=12, sampling_seed=i, ignore_eos=True
            ),
            logprobs=LogprobParams() if i == 3 else None,
        )
        for i in range(5)
    ]


@pytest.mark.parametrize(("how", "group"), ROUNDED)
def test_settings_change_no_bit_of_a_rounded_model(how: str, group: int, checkpoints: Checkpoints) -> None:
    folder, _ = checkpoints("qwen3")
    alone = {}
    for request in requests():
        alone |= run(make_core(rounded(folder, how, group, prefix_cache=False)), [request])
    for settings in SETTINGS:
        assert run(make_core(rounded(folder, how, group, **settings)), requests()) == alone


@pytest.mark.parametrize(("how", "most"), [("int8", 0.1), ("int4", 0.7)])
def test_a_rounded_model_is_close_to_the_model(how: str, most: float, checkpoints: Checkpoints) -> None:
    folder, _ = checkpoints("qwen3")
    start = plan((0, 40, True), admits=[admit(list(range(40)), list(range(6)), params=SamplingParams())])
    plain = make_worker(engine_config(folder, page_size=8, num_pages=200)).forward(start).logits
    found = make_worker(rounded(folder, how, 32)).forward(start).logits
    assert plain is not None and found is not None
    assert 0 < (found - plain).norm() / plain.norm() < most


def test_a_weight_that_is_not_finite_is_named(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints("qwen3")[0], tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.gate_proj, .*up_proj.*not finite"):
        make_worker(rounded(folder, "int8", 32))
