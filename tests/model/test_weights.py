"""Checkpoints: shards, and every way in which one can be broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.model.conftest import Checkpoints
from tests.model.engine import admit, engine_config, make_worker, plan
from trunkline.config.model_spec import ModelError
from trunkline.types import SamplingParams

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def folder(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints("llama")[0], tmp_path / "model"))


SAMPLED = SamplingParams(temperature=1.0)  # such rows need their logits


def first_logits(folder: Path) -> Tensor:
    worker = make_worker(engine_config(folder))
    logits = worker.forward(plan((0, 4, True), admits=[admit([5, 6, 7, 8], [0], params=SAMPLED)])).logits
    assert logits is not None
    return logits


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / FILE)
    edit(tensors)
    save_file(tensors, folder / FILE)


def shard(folder: Path) -> list[str]:
    """Split the checkpoint into two files and an index; returns their names."""
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    names = sorted(tensors)
    where = {name: files[i % 2] for i, name in enumerate(names)}
    for file in files:
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return files


def refused(folder: Path, code: str) -> str:
    with pytest.raises(ModelError) as caught:
        first_logits(folder)
    assert caught.value.code == code
    assert str(folder) in caught.value.message
    return caught.value.message


def test_shards_load_as_one_file_does(folder: Path) -> None:
    whole = first_logits(folder)
    shard(folder)
    assert torch.equal(first_logits(folder), whole)


def test_weights_are_not_kept_mapped_to_the_file(folder: Path) -> None:
    worker = make_worker(engine_config(folder))
    before = worker.forward(plan((0, 4, True), admits=[admit([5, 6, 7, 8], [0], params=SAMPLED)])).logits
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(b"\0" * len(data))
    after = worker.forward(
        plan((1, 4, True), admits=[admit([5, 6, 7, 8], [1], row=1, params=SAMPLED)])
    ).logits
    assert before is not None and after is not None and torch.equal(before, after)


def test_half_precision_checkpoints_are_widened(folder: Path) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].bfloat16()

    exact = first_logits(folder)
    change(folder, halve)
    found = first_logits(folder)
    assert found.dtype == torch.float32
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.05


def test_missing_shard(folder: Path) -> None:
    files = shard(folder)
    (folder / files[1]).unlink()
    assert "1 of 2 weight files are missing: model-00002-of-00002.safetensors" in refused(
        folder, "missing_shard"
    )


def test_no_weights(folder: Path) -> None:
    (folder / FILE).unlink()
    refused(folder, "no_weights")


def test_truncated_file(folder: Path) -> None:
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[: len(data) // 2])
    refused(folder, "bad_checkpoint")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../x"}}']
)
def test_malformed_index(folder: Path, text: str) -> None:
    shard(folder)
    (folder / INDEX).write_text(text)
    refused(folder, "bad_checkpoint")


def test_index_that_names_an_absent_tensor(folder: Path) -> None:
    files = shard(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.ghost"] = files[0]
    (folder / INDEX).write_text(json.dumps(index))
    assert "model.ghost" in refused(folder, "missing_tensor")


def test_missing_tensor(folder: Path) -> None:
    change(folder, lambda tensors: tensors.__delitem__(NORM))
    message = refused(folder, "missing_tensor")
    assert NORM in message and "[48]" in message


def test_extra_tensors(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({f"model.extra.{i}": torch.ones(2) for i in range(7)}))
    message = refused(folder, "extra_tensor")
    assert "7 tensors" in message and "model.extra.0" in message and "and 2 more" in message


def test_rotary_buffers_of_old_checkpoints_are_ignored(folder: Path) -> None:
    expected = first_logits(folder)
    change(
        folder,
        lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    )
    assert torch.equal(first_logits(folder), expected)


def test_wrong_shape(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({NORM: torch.ones(47)}))
    message = refused(folder, "wrong_shape")
    assert NORM in message and "[47]" in message and "[48]" in message


def test_wrong_dtype(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({NORM: torch.ones(48, dtype=torch.int8)}))
    assert "torch.int8" in refused(folder, "wrong_dtype")
