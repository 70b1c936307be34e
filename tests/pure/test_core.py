"""The loop and its fault fence, with a worker that counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from trunkline.cache import PrefixCache
from trunkline.config.schema import SchedulerConfig
from trunkline.engine.core import EngineCore, EngineDead
from trunkline.engine.guidance import Guidance
from trunkline.engine.owners import Owners
from trunkline.engine.process import WARM_AFTER, run_loop
from trunkline.engine.steplog import KEPT, WATCH_TIME
from trunkline.messages import (
    Abort,
    AddRequest,
    Done,
    FlushCache,
    GetSnapshot,
    GetStats,
    Gone,
    Outputs,
    Pause,
    Ready,
    Resume,
    Shutdown,
    Snapshot,
    Stats,
    TokensOut,
    decode_from_core,
    encode,
)
from trunkline.scheduler.plan import RowOutput, StepOutput, StepPlan
from trunkline.scheduler.scheduler import Scheduler
from trunkline.types import SamplingParams


@dataclass
class CountingWorker:
    """Answers with the length of the row's tokens, so every output can be predicted."""

    needs_host_seq_lens: bool = False
    fail_at: dict[int, str] = field(default_factory=dict)  # step -> "forward", "sample" or "result"
    lengths: dict[int, int] = field(default_factory=dict)
    unread: int = 0
    most_unread: int = 0

    def forward(self, plan: StepPlan) -> StepPlan:
        self._break(plan, "forward")
        for admit in plan.admits:
            self.lengths[admit.row] = len(admit.token_ids)
        return plan

    def sample(self, step: StepPlan, masks: None) -> Pending:
        self._break(step, "sample")
        rows = []
        for row in step.rows:
            rows.append(RowOutput([self.lengths[row.row]] if row.samples else []))
            self.lengths[row.row] += row.samples
        self.unread += 1
        self.most_unread = max(self.most_unread, self.unread)
        return Pending(self, step, StepOutput(rows))

    def _break(self, plan: StepPlan, where: str) -> None:
        if self.fail_at.get(plan.step) == where:
            raise RuntimeError(f"planted in {where}")


@dataclass
class Pending:
    worker: CountingWorker
    plan: StepPlan
    output: StepOutput

    def result(self) -> StepOutput:
        self.worker.unread -= 1
        self.worker._break(self.plan, "result")
        return self.output


def core(depth: int = 0, **worker: object) -> EngineCore:
    config = SchedulerConfig(max_running=2, step_tokens=8, max_context=64)
    scheduler = Scheduler(config, PrefixCache(64, 1), eos_token_ids=(), vocab_size=100)
    return EngineCore(scheduler, CountingWorker(**worker), depth)


def ask(rid: str, prompt: int = 3, new: int = 5) -> AddRequest:
    return AddRequest(rid=rid, token_ids=[1] * prompt, params=SamplingParams(max_new_tokens=new))


def run(c: EngineCore) -> dict[str, tuple[list[int], str]]:
    said: dict[str, tuple[list[int], str]] = {}
    while c.has_work:
        for out in c.step():
            tokens, _ = said.get(out.rid, ([], ""))
            said[out.rid] = (
                tokens + out.token_ids,
                (out.finish.code or out.finish.kind) if out.finish else "",
            )
        c.scheduler.check()
    return said


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("host_lens", [False, True])
def test_every_depth_gives_the_same_tokens(depth: int, host_lens: bool) -> None:
    c = core(depth, needs_host_seq_lens=host_lens)
    c.handle(ask("a", 3))
    c.handle(ask("b", 13))
    assert run(c) == {"a": ([3, 4, 5, 6, 7], "length"), "b": ([13, 14, 15, 16, 17], "length")}
    assert c.worker.most_unread == (1 if host_lens else depth + 1)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("where", ["forward", "sample", "result"])
def test_a_broken_step_ends_its_requests_and_spares_the_rest(depth: int, where: str) -> None:
    c = core(depth, fail_at={2: where})
    for rid in "abc":
        c.handle(ask(rid))
    said = run(c)
    assert {rid: code for rid, (_, code) in said.items()} == {
        "a": "step_failed",
        "b": "step_failed",
        "c": "length",
    }
    assert said["c"][0] == [3, 4, 5, 6, 7]
    assert c.scheduler.gauges()["pages_in_use"] == 0


def test_an_engine_that_only_fails_gives_up() -> None:
    c = core(fail_at=dict.fromkeys(range(100), "forward"))
    with pytest.raises(EngineDead, match="planted in forward"):
        for index in range(10):
            c.handle(ask(str(index)))
            run(c)


def test_messages() -> None:
    c = core()
    assert c.handle(ask("a")) == []
    (refused,) = c.handle(ask("a"))
    assert isinstance(refused, Outputs) and refused.items[0].finish is not None
    assert (refused.items[0].finish.code, refused.items[0].finish.param) == ("duplicate_rid", "rid")
    (busy,) = c.handle(FlushCache("1"))
    assert isinstance(busy, Done) and not busy.ok
    c.step()
    c.handle(Abort("a"))
    (flushed,) = c.handle(FlushCache("2"))
    assert isinstance(flushed, Done) and flushed.ok
    (stats,) = c.handle(GetStats("3"))
    assert isinstance(stats, Stats)
    assert (stats.counters["requests"], stats.counters["aborted"], stats.gauges["pages_free"]) == (1, 1, 64)
    c.handle(ask("b"))
    (ended,) = c.handle(Shutdown())
    assert isinstance(ended, Outputs) and ended.items[0].finish is not None
    assert c.stopping and ended.items[0].finish.code == "shutdown"


def look(c: EngineCore) -> Snapshot:
    (snapshot,) = c.handle(GetSnapshot("look"))
    assert isinstance(snapshot, Snapshot) and decode_from_core(encode(snapshot)) == snapshot
    return snapshot


def test_a_snapshot_shows_the_tree_the_requests_and_the_steps() -> None:
    c = core(depth=1)
    shared = list(range(1, 9))
    for i in range(5):
        c.handle(
            AddRequest(rid=f"r{i}", token_ids=[*shared, 20 + i], params=SamplingParams(max_new_tokens=9))
        )
    assert [state.phase for state in look(c).requests] == ["waiting"] * 5
    for _ in range(6):
        c.step()
    seen = look(c)
    edges = {edge.number: edge for edge in seen.edges}
    running = [state for state in seen.requests if state.phase == "running"]
    assert seen.num_edges == sum(edge.parent > 0 for edge in seen.edges) > 1 and len(running) > 1
    assert {state.edge for state in running} <= edges.keys()
    trunk = next(edge for edge in seen.edges if edge.head[:1] == [1])
    assert trunk.locks == len(running) and edges[trunk.parent].tokens == 0
    assert all(0 < state.computed < state.prompt_tokens + state.output_tokens for state in running)
    assert (
        sum(step.prompt_tokens + step.decode_tokens for step in seen.steps)
        == seen.counters["computed_tokens"]
    )
    assert seen.steps[0].prompt_tokens > 0 and seen.steps[-1].decode_tokens > 0


def test_steps_are_recorded_only_while_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    c, now = core(depth=0), [100.0]
    monkeypatch.setattr("trunkline.engine.steplog.time.monotonic", lambda: now[0])

    def run() -> None:
        c.handle(AddRequest(rid="r", token_ids=[1, 2], params=SamplingParams(max_new_tokens=2)))
        while c.has_work:
            c.step()

    run()
    assert c.steplog.records() == [] == look(c).steps
    for _ in range(KEPT):
        run()
    assert len(look(c).steps) == KEPT
    now[0] += WATCH_TIME + 1
    run()
    assert c.steplog.records() == []


READY = Ready(max_context=64, num_pages=64, page_size=1, max_running=2, vocab_size=100)


class _IdleChannel:
    """Nothing comes, `beats` times; then the end."""

    def __init__(self, beats: int) -> None:
        self.beats = beats

    def receive(self, timeout: float) -> list[Any]:
        self.beats -= 1
        return [] if self.beats >= 0 else [(0, Shutdown())]

    def send(self, message: object, to: int) -> None: ...

    def wake(self) -> None: ...


class _CountingCompiler:
    def __init__(self) -> None:
        self.warmed = 0

    def submit(self, spec: object) -> Any:
        raise AssertionError("nothing was asked for")

    def warm(self) -> None:
        self.warmed += 1

    def close(self) -> None: ...


def test_grammars_are_made_ready_when_the_engine_is_idle_and_only_once() -> None:
    for beats, expected in ((WARM_AFTER - 1, 0), (WARM_AFTER, 1), (5 * WARM_AFTER, 1)):
        compiler, idle = _CountingCompiler(), core()
        idle.guidance = Guidance(compiler)
        run_loop(idle, _IdleChannel(beats), READY)
        assert compiler.warmed == expected


# ---------------------------------------------------------------------- pause, owners
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_pause_in_place_or_with_retraction_changes_no_token(depth: int) -> None:
    for mode in ("in_place", "retract"):
        c, said = core(depth), dict[str, list[int]]()
        c.handle(ask("a", 3))
        c.handle(ask("b", 13))

        def take(outs: list[TokensOut], said: dict[str, list[int]] = said) -> None:
            for out in outs:
                said.setdefault(out.rid, []).extend(out.token_ids)

        for _ in range(3):
            take(c.step())
        outputs, done = c.handle(Pause("c", mode))  # type: ignore[arg-type]
        assert isinstance(outputs, Outputs) and isinstance(done, Done) and done.ok
        take(outputs.items)
        assert not c.can_step and c.has_work and c.worker.unread == 0
        c.handle(ask("late", 4))
        assert c.scheduler.num_running == (2 if mode == "in_place" else 0)
        (flushed,) = c.handle(FlushCache("f"))
        assert isinstance(flushed, Done) and flushed.ok == (mode == "retract")
        c.handle(Resume("c"))
        while c.has_work:
            take(c.step())
            c.scheduler.check()
        assert said == {"a": [3, 4, 5, 6, 7], "b": [13, 14, 15, 16, 17], "late": [4, 5, 6, 7, 8]}


def test_a_pause_may_abort() -> None:
    c = core()
    c.handle(ask("a"))
    c.step()
    outputs, _ = c.handle(Pause("c", "abort"))
    assert isinstance(outputs, Outputs)
    assert [(out.rid, out.finish and out.finish.code) for out in outputs.items] == [("a", "aborted")]
    c.handle(ask("b"))
    c.handle(Resume("c"))
    assert run(c)["b"][1] == "length"


def test_each_output_goes_to_whom_it_belongs() -> None:
    owners = Owners(c := core())
    assert owners.handle(1, ask("a")) == owners.handle(2, ask("b")) == []
    ((to, refusal),) = owners.handle(2, ask("a"))
    assert to == 2 and isinstance(refusal, Outputs)
    assert refusal.items[0].finish is not None and refusal.items[0].finish.code == "duplicate_rid"
    assert owners.handle(2, Abort("a")) == [] and c.scheduler.num_waiting == 2  # not its own
    sorted_outputs = owners.sort(c.step())
    assert [(to, [out.rid for out in found.items]) for to, found in sorted_outputs] == [
        (1, ["a"]),
        (2, ["b"]),
    ]  # type: ignore[union-attr]
    ((to, stats),) = owners.handle(7, GetStats("s"))
    assert to == 7 and isinstance(stats, Stats)
    owners.handle(0, Gone(1))
    assert [request.rid for request in c.scheduler._requests.values()] == ["b"]
    owners.handle(2, Abort("b"))
    assert not c.has_work
    owners.handle(3, ask("b"))
    owners.handle(2, Abort("b"))  # late, and it means the other's
    assert c.has_work
    ((to, ended),) = owners.handle(2, Abort("", all=True))
    assert to == 3 and isinstance(ended, Outputs)
    assert owners.handle(1, ask("late")) == [] and not c.has_work  # on its way when the frontend died
