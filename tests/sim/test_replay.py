"""Recorded plans: a refactor must reproduce them byte for byte."""

from __future__ import annotations

import msgspec
import pytest

from tests.sim.replay import golden_file, plans_of, workloads
from trunkline.scheduler.plan import StepPlan


@pytest.mark.parametrize("name", workloads())
def test_plans_are_as_recorded(name: str) -> None:
    found = plans_of(workloads()[name]).splitlines()
    recorded = golden_file(name).read_bytes().splitlines()
    for index, (new, old) in enumerate(zip(found, recorded, strict=False)):
        assert new == old, f"plan {index} of {name} changed; if that is meant: python -m tests.sim --record"
    assert len(found) == len(recorded), f"{name} takes {len(found)} plans, recorded are {len(recorded)}"


def test_the_workloads_show_what_they_are_for() -> None:
    plans = {
        name: [
            msgspec.json.decode(line, type=StepPlan) for line in golden_file(name).read_bytes().splitlines()
        ]
        for name in workloads()
    }

    def any_plan(name: str, what: str) -> bool:
        tests = {
            "mixed": lambda plan: len({row.q_len > 1 for row in plan.rows}) == 2,
            "chunk": lambda plan: any(not row.samples for row in plan.rows),
            "drafts": lambda plan: any(row.num_drafts for row in plan.rows),
            "hit": lambda plan: any(admit.computed and not admit.received for admit in plan.admits),
            "resumed": lambda plan: any(len(admit.token_ids) > admit.prompt_len for admit in plan.admits),
            "received": lambda plan: any(admit.received for admit in plan.admits),
        }
        return any(tests[what](plan) for plan in plans[name])

    assert any_plan("chunks_beside_decode", "mixed") and any_plan("chunks_beside_decode", "chunk")
    assert not any_plan("mix_never", "mixed") and any_plan("mix_never", "chunk")
    assert any_plan("prefix_tree", "hit")
    assert any_plan("preemption", "resumed")
    assert any_plan("drafts_overlapped", "drafts")
    assert any_plan("remote_start_and_abort", "received")
    assert {name for name in plans if golden_file(name).stat().st_size > 30_000} == set()


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in golden_file("x").parent.glob("*")} == set(workloads())
