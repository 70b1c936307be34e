"""The fast tier of the simulation, and tests that its toy model and worker notice what they should."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from tests.sim.__main__ import run_many, run_one
from tests.sim.cases import Case, Submission, make_case
from tests.sim.mutations import MUTATIONS, planted
from tests.sim.runner import run_case, run_chunk
from tests.sim.shrink import shrink
from tests.sim.toy_lm import generate, slot_of, start_state
from tests.sim.worker import Arrival, ProtocolError, ToyWorker
from trunkline.config.schema import SchedulerConfig
from trunkline.messages import AddRequest
from trunkline.scheduler.plan import Admit, PagesAt, RowStep, StepPlan
from trunkline.types import CacheKey, SamplingParams

CASES = 600


def test_random_cases_equal_naive_generation() -> None:
    counts, failed = run_chunk(range(CASES))
    assert not failed, f"python -m tests.sim --case {failed[0][0]} --shrink: {failed}"
    # Whatever is not exercised is not tested: each of these must have happened often.
    floor = {"retractions": 100, "drafts": 1000, "chunks": 1000, "swaps": 100, "cached_tokens": 1000}
    floor |= {"received": 100, "flushed": 100, "refused": 50, "id_reused": 50, "request_failed": 40}
    floor |= {"aborted_waiting": 50, "aborted_prefill": 20, "aborted_decode": 30, "aborted_preempted": 3}
    floor |= {"step_failed": 15, "aborted_all": 20, "forced": 500, "withdrawn": 60, "masks": 1500}
    floor |= {"retracted_all": 50}
    floor |= {"pooled": 100, "aborted_compiling": 10, "invalid_grammar": 10, "grammar_too_complex": 5}
    rare = {name: counts[name] for name, least in floor.items() if counts[name] < least}
    assert not rare, f"too rare to mean anything: {rare}"


def test_a_case_is_the_same_every_time() -> None:
    assert make_case(5) == make_case(5)
    assert run_case(make_case(5)) == run_case(make_case(5))


def test_one_case_is_traced(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_one(7, smaller=False) == 0
    assert "step 0: retires [] admits [" in capsys.readouterr().out


def test_many_cases_in_two_processes(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_many(120, seed=50, jobs=2, as_json=True) == 0
    record = json.loads(capfd.readouterr().out)
    assert record["failed"] == [] and record["counts"] == dict(run_chunk(range(50, 170))[0])


def test_a_failing_case_is_named_and_shown(capfd: pytest.CaptureFixture[str]) -> None:
    with planted(next(mutation for mutation in MUTATIONS if mutation.name == "key_ignored")):
        assert run_many(60, seed=0, jobs=1, as_json=False) == 1
    shown = capfd.readouterr()
    assert "--case" in shown.out and "SchedulerConfig" in shown.err and "another prefix" in shown.err


def test_features_do_not_change_outputs() -> None:
    """The reference knows nothing of the configuration, so this holds by the cases above; one look at it."""
    case = next(case for case in map(make_case, range(100)) if len(case.submissions) > 4 and not case.breaks)
    plain = [replace(entry, abort_after=None, fails_at=-1) for entry in case.submissions]
    tokens = {
        run_case(replace(case, submissions=plain, num_drafts=k, abort_all_at=None))["tokens"]
        for k in range(4)
    }
    assert len(tokens) == 1


class TestToyModel:
    message = AddRequest(
        rid="a", token_ids=[5, 6, 7, 8], params=SamplingParams(max_new_tokens=8, ignore_eos=True)
    )

    def test_every_prompt_token_and_the_key_count(self) -> None:
        outputs = [tuple(generate(self.message, 64).token_ids)]
        for position in range(4):
            changed = list(self.message.token_ids)
            changed[position] += 1
            other = AddRequest(rid="a", token_ids=changed, params=self.message.params)
            outputs.append(tuple(generate(other, 64).token_ids))
        salted = AddRequest(
            rid="a", token_ids=[5, 6, 7, 8], params=self.message.params, cache_key=CacheKey(salt="x")
        )
        outputs.append(tuple(generate(salted, 64).token_ids))
        assert len(set(outputs)) == 6

    def test_stop_and_minimum(self) -> None:
        free = generate(self.message, 64).token_ids
        stop = free[2]
        params = SamplingParams(max_new_tokens=8, ignore_eos=True, stop_token_ids=(stop,))
        stopped = generate(AddRequest(rid="a", token_ids=[5, 6, 7, 8], params=params), 64)
        assert stopped.token_ids == free[: free.index(stop) + 1]
        assert stopped.finish.kind == "stop" and stopped.finish.matched == stop
        params = SamplingParams(max_new_tokens=8, min_new_tokens=8, ignore_eos=True, stop_token_ids=(stop,))
        assert stop not in generate(AddRequest(rid="a", token_ids=[5, 6, 7, 8], params=params), 64).token_ids

    def test_ends_at_the_context(self) -> None:
        params = SamplingParams(max_new_tokens=None, ignore_eos=True)
        assert len(generate(AddRequest(rid="a", token_ids=[5] * 10, params=params), 16).token_ids) == 6


class TestWorkerRefuses:
    """Each rule that the worker holds plans to, broken once."""

    def worker(self, shared: set[int] | None = None) -> ToyWorker:
        return ToyWorker(
            num_pages=8,
            page_size=2,
            max_running=2,
            step_tokens=6,
            max_context=12,
            num_drafts=1,
            depth=0,
            arrivals={"a": Arrival(CacheKey()), "b": Arrival(CacheKey(), received=2)},
            shared_pages=lambda: shared or set(),
        )

    @staticmethod
    def admit(
        row: int = 0, rid: str = "a", computed: int = 0, pages: tuple[int, ...] = (0, 1), received: int = 0
    ) -> Admit:
        return Admit(
            row=row,
            rid=rid,
            token_ids=[30, 31, 32],
            prompt_len=3,
            computed=computed,
            pages=list(pages),
            params=SamplingParams(),
            logprobs=None,
            prompt_logprobs_from=None,
            received=received,
        )

    def run(self, worker: ToyWorker, *plans: StepPlan) -> None:
        for plan in plans:
            worker.sample(worker.forward(plan), None).result()

    def test_nothing_of_a_good_plan(self) -> None:
        worker = self.worker()
        self.run(
            worker,
            StepPlan(step=0, admits=[self.admit()], rows=[RowStep(0, 2, 0, False)]),
            StepPlan(step=1, rows=[RowStep(0, 1, 0, True)]),
            StepPlan(step=2, rows=[RowStep(0, 1, 0, True)]),
            StepPlan(step=3, retires=[0]),
        )
        first = slot_of(start_state(CacheKey()), 30, 0)
        assert worker.kv[0][0] == first and not worker.rows

    @pytest.mark.parametrize(
        ("plan", "why"),
        [
            (StepPlan(step=0, rows=[RowStep(0, 1, 0, True)]), "without an admit"),
            (StepPlan(step=0, retires=[1]), "not live"),
            (StepPlan(step=0, new_pages=[PagesAt(1, 0, [0])]), "not live"),
            (StepPlan(step=0, admits=[admit(row=2)]), "no such row"),
            (StepPlan(step=0, admits=[admit(), admit()]), "the row is live"),
            (StepPlan(step=0, admits=[admit(), admit(row=1, pages=(2,))]), "the request has a row"),
            (
                StepPlan(step=0, admits=[admit(), admit(row=1, rid="b", pages=(1,))]),
                "another row's page table",
            ),
            (StepPlan(step=0, admits=[admit(pages=(7,))]), "belongs to the prefix tree"),
            (StepPlan(step=0, admits=[admit(pages=(9,))]), "page ids"),
            (StepPlan(step=0, admits=[admit(computed=2)]), "nobody shares"),
            (StepPlan(step=0, admits=[admit(computed=2, pages=(7,))]), "never written"),
            (StepPlan(step=0, admits=[admit(computed=3)]), "3 of the tokens computed"),
            (StepPlan(step=0, admits=[admit(received=2, computed=2)]), "2 tokens received"),
            (StepPlan(step=0, admits=[admit()], rows=[RowStep(0, 4, 0, True)]), "has 3 tokens"),
            (StepPlan(step=0, admits=[admit()], rows=[RowStep(0, 3, 0, False)]), "samples=False"),
            (StepPlan(step=0, admits=[admit()], rows=[RowStep(0, 4, 1, True)]), "0 exist"),
            (
                StepPlan(step=0, admits=[admit(pages=(0,))], rows=[RowStep(0, 3, 0, True)]),
                "page table holds 2",
            ),
            (StepPlan(step=0, admits=[admit()], rows=[RowStep(0, 1, 0, False)] * 2), "twice in one step"),
            (StepPlan(step=0, admits=[admit()], new_pages=[PagesAt(0, 3, [4])]), "the page table has 2"),
            (StepPlan(step=0, admits=[admit()], new_pages=[PagesAt(0, 0, [4])]), "while being written"),
            (StepPlan(step=-1), "after step"),
        ],
    )
    def test_a_wrong_plan(self, plan: StepPlan, why: str) -> None:
        with pytest.raises(ProtocolError, match=why):
            self.run(self.worker(shared={7}), plan)

    def test_a_page_that_became_shared_is_not_written(self) -> None:
        shared: set[int] = set()
        worker = self.worker()
        worker.shared_pages = lambda: shared
        self.run(worker, StepPlan(step=0, admits=[self.admit()], rows=[RowStep(0, 1, 0, False)]))
        shared.add(0)
        with pytest.raises(ProtocolError, match="the prefix tree shares"):
            self.run(worker, StepPlan(step=1, rows=[RowStep(0, 1, 0, False)]))

    def test_kv_lost_on_the_way_is_noticed(self) -> None:
        worker = self.worker()
        self.run(worker, StepPlan(step=0, admits=[self.admit()], rows=[RowStep(0, 2, 0, False)]))
        worker.kv[0][0] = None
        with pytest.raises(ProtocolError, match="unwritten KV at 0 of 2"):
            self.run(worker, StepPlan(step=1, rows=[RowStep(0, 1, 0, True)]))

    def test_a_stale_slot_changes_the_output(self) -> None:
        outputs = set()
        for stale in (False, True):
            worker = self.worker()
            self.run(worker, StepPlan(step=0, admits=[self.admit()], rows=[RowStep(0, 2, 0, False)]))
            if stale:
                worker.kv[0][0] = 12345
            step = worker.forward(StepPlan(step=1, rows=[RowStep(0, 1, 0, True)]))
            outputs.add(step.rows[0].attended[0])
        assert len(outputs) == 2


def test_a_failing_case_shrinks() -> None:
    """With a bug in preemption, what is left is the few requests that it takes to preempt one."""
    bug = next(mutation for mutation in MUTATIONS if mutation.name == "preempted_keeps_computed")
    with planted(bug):
        failing = (make_case(seed) for seed, _ in run_chunk(range(60))[1])
        case = next(case for case in failing if len(case.submissions) >= 5)
        smaller = shrink(case)
    assert 2 <= len(smaller.submissions) <= 3
    assert smaller.scheduler.depth == 0 and smaller.num_drafts == 0 and not smaller.breaks


def test_a_plan_that_only_swaps_pages_reaches_the_worker() -> None:
    """Found by a random case: with all rows held back, a plan had page changes and nothing else."""
    prompts = ([1] * 5, [1, 1, 1, 1, 1, 1, 63, 20, 17, 17, 21, 22, 22])
    messages = [
        AddRequest(rid=f"r{i}", token_ids=prompt, params=SamplingParams(max_new_tokens=3, ignore_eos=True))
        for i, prompt in enumerate(prompts)
    ]
    config = SchedulerConfig(
        max_running=8, step_tokens=8, max_context=160, conservativeness=0.0, prefill_wait=False
    )
    submissions = [Submission(message, at=0) for message in messages]
    case = Case(-1, config, 6, 4, True, 0, False, submissions, pauses=True)
    plans: list[StepPlan] = []
    run_case(case, trace=plans.append)
    assert any(plan.new_pages and not (plan.rows or plan.retires) for plan in plans)


def test_counts_add_up_over_chunks() -> None:
    one, _ = run_chunk(range(10))
    first, _ = run_chunk(range(5))
    second, _ = run_chunk(range(5, 10))
    assert first + second == one and isinstance(one, Counter)
