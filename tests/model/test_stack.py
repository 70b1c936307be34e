"""All layers in one native call give what the operations give one by one, to the bit."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
import torch

from tests.model.conftest import Checkpoints
from tests.model.engine import admit, engine_config, make_worker, plan
from trunkline.config.model_spec import load_model_spec
from trunkline.kernels.cpu import ops as native
from trunkline.types import SamplingParams
from trunkline.worker.runner import ModelWorker


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("how", ["plain", "int8", "int4"])
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "int8")],
)
@pytest.mark.parametrize("family", ["qwen3", "mistral", "llama-linear-bias"])
def test_the_stack_is_its_layers(
    isa: str, how: str, dtype: str, kv_dtype: str, family: str, checkpoints: Checkpoints
) -> None:
    config = engine_config(checkpoints(family)[0], page_size=8, num_pages=100)
    config = msgspec.structs.replace(
        config,
        model=msgspec.structs.replace(config.model, dtype=dtype, quantization=how),
        cache=msgspec.structs.replace(config.cache, kv_dtype=kv_dtype),
    )
    native.select_isa(isa)
    try:
        results = []
        for whole in (True, False):
            worker = make_worker(config)
            assert worker.model.stack is not None
            if not whole:
                worker.model.stack = None
            logits = []
            for size, admits in script():
                step = worker.forward(plan((0, size, True), admits=admits))
                logits.append(step.logits.clone())
            written = worker.pool.data[:, 20:37].clone()  # whole pages of those that were written
            results.append((logits, written))
    finally:
        native.select_isa(native.isas()[0])
    (one, one_kv), (other, other_kv) = results
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(one_kv, other_kv)


def test_a_cap_and_a_scale_reach_both(checkpoints: Checkpoints) -> None:
    config = engine_config(checkpoints("qwen3")[0], page_size=8, num_pages=100)
    spec = load_model_spec(config.model.path)
    found = []
    for changes in ({}, {"attention_soft_cap": 0.5, "attention_scale": 0.4}):
        for whole in (True, False):
            worker = ModelWorker(config, dataclasses.replace(spec, **changes))
            if not whole:
                worker.model.stack = None
            steps = [worker.forward(plan((0, size, True), admits=admits)) for size, admits in script()]
            found.append(steps[-1].logits.clone())
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    assert (found[0] - found[2]).abs().max() > 1e-3


def script() -> list[tuple[int, list[object]]]:
    ids = torch.randint(0, 300, (143,), generator=torch.Generator().manual_seed(1)).tolist()
    first = admit(ids, list(range(20, 40)), params=SamplingParams(temperature=1.0))
    return [(7, [first]), (1, []), (134, []), (1, [])]
