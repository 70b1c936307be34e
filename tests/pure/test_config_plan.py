"""The memory plan against what a worker really holds (P16: within 3 %)."""

from __future__ import annotations

from pathlib import Path

import pytest

from trunkline.cli.make_model import make_model
from trunkline.config import memory
from trunkline.config.flags import Args
from trunkline.config.model_spec import load_model_spec
from trunkline.config.resolve import load_config


@pytest.mark.parametrize(("page_size", "tokens"), [(1, 3000), (16, 4096)])
def test_the_plan_is_what_the_worker_holds(page_size: int, tokens: int, tmp_path: Path) -> None:
    from trunkline.worker.runner import ModelWorker

    make_model("tiny", tmp_path)
    args = Args(
        model_path=str(tmp_path), page_size=page_size, max_total_tokens=tokens, device="cpu", dtype="float32"
    )
    resolved = load_config(args)
    held = ModelWorker(resolved.config, load_model_spec(str(tmp_path))).memory_report()
    plan = resolved.memory
    assert held["weight_bytes"] == pytest.approx(plan.size_of("weights"), rel=0.03)
    assert held["kv_pool_bytes"] == pytest.approx(plan.size_of("KV pool"), rel=0.03)
    rope = resolved.config.scheduler.max_context * 2 * 16 * 4
    assert held["rows_bytes"] == pytest.approx(plan.size_of("rows") - rope, rel=0.03)


def test_the_plan_knows_the_bounds_of_the_attention_op() -> None:
    from trunkline.kernels.ref import paged_attention

    assert memory.GATHERED_KEYS == paged_attention._CALL_KEYS
    assert memory.KEPT_MASKS == paged_attention._KEPT_MASKS
