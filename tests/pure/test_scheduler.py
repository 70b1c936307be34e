"""The scheduling rule, request by request, with a worker that answers 7 to everything."""

from __future__ import annotations

import msgspec
import pytest

from trunkline.cache import PrefixCache
from trunkline.config.schema import SchedulerConfig
from trunkline.messages import AddRequest, TokensOut
from trunkline.scheduler.plan import RowOutput, StepOutput, StepPlan
from trunkline.scheduler.request import Request
from trunkline.scheduler.scheduler import Scheduler
from trunkline.types import CacheKey, FinishReason, LogprobParams, RequestError, SamplingParams, TokenLogprobs

DEFAULT = SchedulerConfig(max_running=4, step_tokens=64, max_context=256, max_queued=8)


def scheduler(pages: int = 256, page_size: int = 1, **changes: object) -> Scheduler:
    config = msgspec.structs.replace(DEFAULT, **changes)
    return Scheduler(config, PrefixCache(pages, page_size), eos_token_ids=(2,), vocab_size=100)


def ask(rid: str, prompt: list[int], new: int | None = 4, **fields: object) -> AddRequest:
    return AddRequest(rid=rid, token_ids=prompt, params=SamplingParams(max_new_tokens=new), **fields)


def answer(plan: StepPlan, token: int = 7) -> StepOutput:
    return StepOutput([RowOutput([token] * row.samples) for row in plan.rows])


def step(s: Scheduler, token: int = 7) -> tuple[StepPlan, list[TokensOut]]:
    plan = s.schedule()
    outputs = s.retire(plan, answer(plan, token)) if plan.rows else []
    s.check()
    return plan, outputs


def test_a_prompt_runs_in_chunks_and_only_the_last_samples() -> None:
    s = scheduler(step_tokens=4)
    s.add(ask("a", list(range(10)), 2))
    plans = [step(s)[0] for _ in range(4)]
    assert [[(r.q_len, r.samples) for r in p.rows] for p in plans] == [
        [(4, False)],
        [(4, False)],
        [(2, True)],
        [(1, True)],
    ]
    assert not s.has_work


def test_a_step_never_exceeds_its_budget_and_rows_that_need_one_token_go_first() -> None:
    s = scheduler(step_tokens=8)
    s.add(ask("short", [1], 20))
    step(s)
    s.add(ask("long", list(range(30))))
    for _ in range(4):
        plan, _ = step(s)
        assert plan.num_tokens <= 8
        assert plan.rows[0].q_len == 1
        assert len(plan.rows) == 2


def test_mix_never_takes_turns() -> None:
    s = scheduler(step_tokens=4, mix="never")
    s.add(ask("short", [1, 2], 20))
    step(s)
    s.add(ask("long", list(range(3, 15))))
    sizes = [[row.q_len for row in step(s)[0].rows] for _ in range(5)]
    assert sizes == [[1], [4], [1], [4], [1]] or sizes == [[4], [1], [4], [1], [4]]


def test_steps_are_composed_from_promises_alone() -> None:
    s = scheduler()
    s.add(ask("a", [1, 3, 5], 3))
    plans = [s.schedule() for _ in range(5)]
    assert [len(p.rows) for p in plans] == [1, 1, 1, 0, 0]
    outputs = [out for plan in plans[:3] for out in s.retire(plan, answer(plan))]
    assert [out.token_ids for out in outputs] == [[7], [7], [7]]
    assert outputs[-1].finish is not None and outputs[-1].finish.kind == "length"


def test_results_in_flight_of_a_request_that_ended_are_dropped() -> None:
    s = scheduler()
    s.add(ask("a", [1, 3], 8))
    first, second = s.schedule(), s.schedule()
    ended = s.retire(first, answer(first, token=2))
    assert ended[0].finish is not None and ended[0].finish.matched == 2
    s.add(ask("b", [4, 5, 6], 8))
    third = s.schedule()
    assert third.retires == [0] and third.admits[0].rid == "b"
    assert s.retire(second, answer(second)) == []
    assert [out.rid for out in s.retire(third, answer(third))] == ["b"]
    s.check()


def test_a_shared_prefix_is_computed_once_and_waited_for() -> None:
    s = scheduler(step_tokens=32, max_context=512)
    prefix = list(range(1, 65))
    for index in range(3):
        s.add(ask(f"r{index}", [*prefix, 70 + index, 80], 2))
    computed = 0
    while s.has_work:
        computed += step(s)[0].num_tokens
    assert computed == len(prefix) + 3 * 2 + 3
    assert s.counters["cached_tokens"] == 2 * len(prefix)


def test_without_waiting_the_prefix_is_computed_by_each_and_stored_once() -> None:
    s = scheduler(step_tokens=256, prefill_wait=False)
    prompt = list(range(1, 41))
    s.add(ask("a", prompt, 1))
    s.add(ask("b", prompt, 1))
    plan, _ = step(s)
    assert plan.num_tokens == 80
    assert s.gauges()["pages_cached"] == len(prompt)


def test_salts_are_not_shared_and_not_waited_for() -> None:
    s = scheduler(step_tokens=256)
    for salt in "ab":
        s.add(ask(salt, list(range(1, 40)), 1, cache_key=CacheKey(salt=salt)))
    plan, outputs = step(s)
    assert len(plan.rows) == 2 and [out.cached_tokens for out in outputs] == [0, 0]


def test_when_pages_run_out_the_latest_is_preempted_and_its_output_continues() -> None:
    s = scheduler(pages=24, conservativeness=0.0)
    s.add(ask("old", [1] * 8, 12))
    s.add(ask("young", [3] * 8, 12))
    said: dict[str, list[int]] = {"old": [], "young": []}
    retractions = 0
    while s.has_work:
        _, outputs = step(s)
        for out in outputs:
            said[out.rid] += out.token_ids
            retractions = max(retractions, out.retractions)
            assert out.rid == "young" or out.retractions == 0
    assert {rid: len(tokens) for rid, tokens in said.items()} == {"old": 12, "young": 12}
    assert retractions >= 1


def test_admission_reserves_room_for_what_runs() -> None:
    s = scheduler(pages=24, conservativeness=1.4)
    s.add(ask("a", [1] * 8, 12))
    s.add(ask("b", [3] * 8, 12))
    while s.has_work:
        step(s)
    assert s.counters["retractions"] == 0


@pytest.mark.parametrize("when", ["waiting", "chunk", "in_flight"])
def test_abort_frees_everything_at_once(when: str) -> None:
    s = scheduler(step_tokens=4)
    s.add(ask("a", list(range(3, 13))))
    plan = s.schedule() if when != "waiting" else None
    if plan is not None and when == "chunk":
        s.retire(plan, answer(plan))
    (out,) = s.abort("a")
    assert out.finish is not None and out.finish.kind == "abort"
    gauges = s.gauges()
    assert gauges["running"] == gauges["waiting"] == gauges["pages_in_use"] == 0
    if when == "in_flight":
        assert plan is not None and s.retire(plan, answer(plan)) == []
    s.check()
    assert s.abort("a") == []


def test_lpm_admits_the_longest_cached_prefix_first_but_starves_nobody() -> None:
    s = scheduler(max_running=1, policy="lpm", max_queued=1000, max_context=1000)
    prefix = list(range(1, 33))
    s.add(ask("warm", [*prefix, 40], 1))
    step(s)
    s.add(ask("cold", [50] * 8, 1))
    order = []
    for index in range(80):
        s.add(ask(f"hit{index}", [*prefix, 41], 1))
        order += [out.rid for out in step(s)[1]]
    assert order[0] == "hit0"
    assert order.index("cold") == 64


def test_priority_goes_first() -> None:
    s = scheduler(max_running=1)
    s.add(ask("low", [1, 3], 1))
    s.add(ask("high", [4, 5], 1, priority=5))
    assert [step(s)[1][0].rid for _ in range(2)] == ["high", "low"]


def test_prompt_logprobs_come_with_the_first_output_and_limit_the_hit() -> None:
    s = scheduler(step_tokens=4)
    prompt = list(range(10, 20))
    s.add(ask("warm", prompt, 1))
    while s.has_work:
        step(s)
    s.add(ask("a", prompt, 1, logprobs=LogprobParams(prompt_start=3)))
    said: list[TokensOut] = []
    position = 4
    while s.has_work:
        plan = s.schedule()
        for admit in plan.admits:
            assert admit.computed == 3 and admit.prompt_logprobs_from == 4
        rows = []
        for row in plan.rows:
            end = min(position + row.q_len, len(prompt))
            rows.append(
                RowOutput(
                    [7] * row.samples,
                    [TokenLogprobs(7, -0.5)] * row.samples,
                    [TokenLogprobs(prompt[p], -float(p)) for p in range(position, end)],
                )
            )
            position = end
        said += s.retire(plan, StepOutput(rows))
    assert len(said) == 1 and said[0].prompt_logprobs is not None
    assert [(e.token_id, e.logprob) for e in said[0].prompt_logprobs] == [(13, None)] + [
        (prompt[p], -float(p)) for p in range(4, 10)
    ]


def test_received_kv_starts_where_the_other_instance_stopped() -> None:
    s = scheduler()
    s.add(ask("a", list(range(3, 23)), 2), received=19)
    plan, _ = step(s)
    assert plan.admits[0].received == plan.admits[0].computed == 19
    assert plan.rows[0].q_len == 1 and plan.rows[0].samples


def test_no_output_tokens_means_computing_the_prompt_only() -> None:
    s = scheduler()
    s.add(ask("a", [1, 3, 4], 0))
    (out,) = step(s)[1]
    assert out.token_ids == [] and out.finish is not None and out.finish.kind == "length"


def test_a_constraint_limits_what_a_request_may_run() -> None:
    class AtMostThree:
        def limit(self, request: Request, q_len: int) -> int:
            return min(q_len, 3)

    cache = PrefixCache(64, 1)
    s = Scheduler(DEFAULT, cache, (2,), 100, constraints=(AtMostThree(),))
    s.add(ask("a", list(range(3, 11)), 1))
    assert [step(s)[0].rows[0].q_len for _ in range(3)] == [3, 3, 2]


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (ask("x", []), "empty_prompt"),
        (ask("x", [1] * 253), "context_length_exceeded"),
        (ask("x", [1] * 300, None), "context_length_exceeded"),
        (ask("x", [1] * 50, 20), "kv_pool_exceeded"),
        (ask("x", [100]), "token_out_of_range"),
        (ask("x", [-1]), "token_out_of_range"),
        (ask("live", [1]), "duplicate_rid"),
        (AddRequest(rid="x", token_ids=[1], params=SamplingParams(temperature=float("nan"))), "out_of_range"),
        (AddRequest(rid="x", token_ids=[1], params=SamplingParams(top_p=0.0)), "out_of_range"),
        (
            AddRequest(rid="x", token_ids=[1], params=SamplingParams(logit_bias={100: 1})),
            "token_out_of_range",
        ),
        (ask("x", [1], logprobs=LogprobParams(top_n=21)), "out_of_range"),
        (ask("x", [1], logprobs=LogprobParams(prompt_start=2)), "out_of_range"),
    ],
)
def test_what_cannot_be_served_is_refused_and_nothing_is_held(message: AddRequest, code: str) -> None:
    s = scheduler(pages=64)
    s.add(ask("live", [1, 3]))
    with pytest.raises(RequestError) as error:
        s.add(message)
    assert error.value.code == code
    s.abort("live")
    assert not s.has_work
    s.check()


def test_a_full_queue_is_refused_with_429() -> None:
    s = scheduler(max_queued=2)
    for index in range(6):
        s.add(ask(f"r{index}", [1]))
    with pytest.raises(RequestError) as error:
        s.add(ask("late", [1]))
    assert error.value.status == 429


def test_a_failed_step_ends_its_requests_only() -> None:
    s = scheduler(max_running=1)
    s.add(ask("bad", [1, 3]))
    s.add(ask("good", [4, 5], 1))
    plan = s.schedule()
    (out,) = s.fail(plan, FinishReason("abort", code="step_failed", status=500))
    assert out.rid == "bad"
    assert [o.rid for o in step(s)[1]] == ["good"]


def test_plans_survive_serialisation() -> None:
    s = scheduler()
    s.add(ask("a", [1, 3, 4]))
    plan = s.schedule()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan) == plan


def test_drafts_leave_a_token_for_every_other_row() -> None:
    config = msgspec.structs.replace(DEFAULT, step_tokens=4)
    s = Scheduler(config, PrefixCache(64, 1), (2,), 100, num_drafts=3)
    for rid in "abcd":
        s.add(ask(rid, [ord(rid) - 90], 9))
    step(s)
    for _ in range(4):
        assert [row.q_len for row in step(s)[0].rows] == [1, 1, 1, 1]
    s.abort("d")
    assert [(row.q_len, row.num_drafts) for row in step(s)[0].rows] == [(2, 1), (1, 0), (1, 0)]


def test_the_last_block_of_a_prompt_is_claimed_too() -> None:
    s = scheduler(step_tokens=256)
    prompt = list(range(1, 33))  # two blocks exactly
    s.add(ask("a", prompt, 2))
    s.add(ask("b", [*prompt, 40, 41], 1))
    plan, _ = step(s)
    assert plan.num_tokens == len(prompt)
    assert step(s)[0].num_tokens == 1 + 2


# ---------------------------------------------------------------------- queues, time, priority
def test_tokens_that_wait_are_bounded() -> None:
    s = scheduler(max_queued_tokens=20)
    s.add(ask("first", [1] * 30))  # alone, it may be as long as it fits
    with pytest.raises(RequestError) as error:
        s.add(ask("late", [1] * 5))
    assert (error.value.status, error.value.code) == (429, "queue_full")
    assert "30 tokens" in error.value.message and "has 5" in error.value.message
    step(s)
    assert s.gauges()["queued_tokens"] == 0
    s.add(ask("late", [3] * 5))


def test_who_waits_or_runs_too_long_ends() -> None:
    now = 100.0
    config = msgspec.structs.replace(DEFAULT, max_running=1, waiting_timeout=2.0, running_timeout=5.0)
    s = Scheduler(config, PrefixCache(256, 1), (2,), 100, clock=lambda: now)
    s.add(ask("runs", [1, 3], 200))
    s.add(ask("waits", [4, 5], 200))
    step(s)
    now = 101.9
    assert s.expire() == []
    now = 102.1
    (out,) = s.expire()
    assert out.finish is not None and (out.rid, out.finish.code, out.finish.status) == (
        "waits", "waiting_timeout", 503
    )  # fmt: skip
    assert out.finish.message is not None and "2.1 s" in out.finish.message
    s.add(ask("next", [4, 5], 200))
    now = 103.0
    assert s.expire() == []
    now = 105.2
    ended = {out.rid: out.finish for out in s.expire()}
    assert {rid: finish.code for rid, finish in ended.items() if finish is not None} == {
        "runs": "running_timeout", "next": "waiting_timeout"
    }  # fmt: skip
    assert ended["runs"] is not None and ended["runs"].status == 504
    assert not s.has_work
    s.check()


def test_the_urgent_take_the_place_of_the_much_less_urgent() -> None:
    s = scheduler(max_running=2, preempt_above=10)
    s.add(ask("low", [1, 3], 20, priority=0))
    s.add(ask("lower", [4, 5], 20, priority=-1))
    step(s)
    s.add(ask("mid", [6, 7], 20, priority=9))
    assert not step(s)[0].admits  # ten more than the least urgent is not enough: more than ten is asked
    s.add(ask("high", [8, 9], 20, priority=10))
    plan, _ = step(s)
    assert [admit.rid for admit in plan.admits] == ["high"]
    assert {request.rid for request in s._running} == {"low", "high"}
    assert s.counters["retractions"] == 1
    s.abort("high")
    assert [admit.rid for admit in step(s)[0].admits] == ["mid"]
    said: dict[str, int] = {}
    for _ in range(60):
        for out in step(s)[1]:
            said[out.rid] = said.get(out.rid, 0) + len(out.token_ids)
    assert not s.has_work and said["lower"] == 20 - 2 and said["mid"] == 19


def test_memory_is_taken_from_the_least_urgent() -> None:
    s = scheduler(pages=24, preempt_above=5, conservativeness=0.0)
    s.add(ask("low", [1, 3, 4, 5], 16, priority=-20))
    step(s)
    for rid in ("a", "b"):
        s.add(ask(rid, [ord(rid) - 60, 9, 8], 16))
        step(s)
    while s.counters["retractions"] == 0:
        step(s)
    assert "low" not in {request.rid for request in s._running}


def test_low_values_first() -> None:
    s = scheduler(max_running=1, low_priority_first=True)
    for priority in (3, 1, 2):
        s.add(ask(f"p{priority}", [priority, 5], 1, priority=priority))
    order = [out.rid for _ in range(3) for out in step(s)[1]]
    assert order == ["p1", "p2", "p3"]


def test_no_stream_of_urgent_requests_starves_anybody() -> None:
    s = scheduler(max_running=1, preempt_above=0)
    s.add(ask("patient", [1, 3], 5, priority=0))
    done = False
    for index in range(400):
        s.add(ask(f"u{index}", [index % 90, 4], 2, priority=100))
        done = done or any(out.rid == "patient" and out.finish for _ in range(2) for out in step(s)[1])
        if s.num_waiting > 3:
            for rid in [request.rid for request in s._waiting if request.rid != "patient"]:
                s.abort(rid)
    assert done


def test_retracting_all_loses_nothing() -> None:
    s = scheduler()
    s.add(ask("a", [1, 3], 6))
    s.add(ask("b", [4, 5, 6], 6))
    said: dict[str, int] = {}
    for index in range(20):
        for out in step(s)[1]:
            said[out.rid] = said.get(out.rid, 0) + len(out.token_ids)
        if index == 2:
            s.retract_all()
            assert (s.num_running, s.num_waiting) == (0, 2)
            s.cache.flush()
            assert s.cache.free_pages == s.cache.num_pages
            s.check()
    assert said == {"a": 6, "b": 6}
