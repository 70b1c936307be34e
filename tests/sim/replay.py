"""Plans of fixed workloads, recorded: a refactor of scheduler or cache must reproduce them byte for byte.

A golden file has one plan a line, as JSON, so that a diff shows the step that changed. When a change of plans
is meant, `python -m tests.sim --record` writes the files anew; the diff belongs in the change's review.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from tests.sim.cases import Case, Submission
from tests.sim.runner import run_case
from trunkline.config.schema import SchedulerConfig
from trunkline.messages import AddRequest
from trunkline.types import CacheKey, LogprobParams, SamplingParams

GOLDEN = Path(__file__).parent / "golden"


def _request(
    rid: str,
    prompt: list[int],
    new: int,
    *,
    logprobs: LogprobParams | None = None,
    salt: str = "",
    priority: int = 0,
) -> AddRequest:
    return AddRequest(
        rid=rid,
        token_ids=prompt,
        params=SamplingParams(max_new_tokens=new, ignore_eos=True),
        logprobs=logprobs,
        cache_key=CacheKey(salt=salt),
        priority=priority,
    )


def _prompt(start: int, count: int) -> list[int]:
    return [(start + 7 * i) % 40 + 24 for i in range(count)]


def _case(
    config: SchedulerConfig, pages: int, size: int, submissions: list[Submission], drafts: int = 0
) -> Case:
    return Case(
        seed=-1,
        scheduler=config,
        num_pages=pages,
        page_size=size,
        prefix_cache=True,
        num_drafts=drafts,
        needs_host_seq_lens=False,
        submissions=submissions,
    )


def workloads() -> dict[str, Case]:
    """Each shows one side of the scheduler; none depends on the random cases."""
    stem = _prompt(1, 32)
    return {
        "chunks_beside_decode": _case(
            SchedulerConfig(max_running=4, step_tokens=8, max_context=96, depth=1),
            pages=64,
            size=4,
            submissions=[Submission(_request(f"r{i}", _prompt(i, 5 + 9 * i), 6), at=2 * i) for i in range(4)],
        ),
        "mix_never": _case(
            SchedulerConfig(max_running=4, step_tokens=8, max_context=96, mix="never"),
            pages=64,
            size=4,
            submissions=[Submission(_request(f"r{i}", _prompt(i, 20), 5), at=3 * i) for i in range(3)],
        ),
        "prefix_tree": _case(
            SchedulerConfig(max_running=6, step_tokens=16, max_context=96, policy="lpm", depth=1),
            pages=96,
            size=4,
            submissions=[
                Submission(
                    _request(f"r{i}", [*stem[: 16 + 16 * (i % 2)], *_prompt(i, 5)], 3, salt="b" * (i == 4)),
                    at=i,
                )
                for i in range(6)
            ],
        ),
        "preemption": _case(
            SchedulerConfig(max_running=4, step_tokens=32, max_context=64, conservativeness=0.0),
            pages=8,
            size=4,
            submissions=[Submission(_request(f"r{i}", _prompt(3 * i, 4), 16), at=0) for i in range(3)],
        ),
        "drafts_overlapped": _case(
            SchedulerConfig(max_running=4, step_tokens=24, max_context=96, depth=1),
            pages=48,
            size=2,
            submissions=[Submission(_request(f"r{i}", _prompt(i, 7), 9), at=i) for i in range(3)],
            drafts=3,
        ),
        "remote_start_and_abort": _case(
            SchedulerConfig(max_running=3, step_tokens=8, max_context=96, depth=2),
            pages=40,
            size=4,
            submissions=[
                Submission(
                    _request("kept", _prompt(1, 14), 6, logprobs=LogprobParams(prompt_start=3, top_n=1)), at=0
                ),
                Submission(_request("received", _prompt(2, 13), 6), at=1, received=10),
                Submission(_request("urgent", _prompt(3, 6), 3, priority=5), at=2),
                Submission(_request("left", _prompt(4, 20), 6), at=1, abort_after=4),
            ],
        ),
    }


def plans_of(case: Case) -> bytes:
    """One line of JSON per plan."""
    lines: list[bytes] = []
    run_case(case, trace=lambda plan: lines.append(msgspec.json.encode(plan)))
    return b"\n".join(lines) + b"\n"


def golden_file(name: str) -> Path:
    return GOLDEN / f"{name}.jsonl"


def record_all() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for name, case in workloads().items():
        data = plans_of(case)
        changed = not golden_file(name).exists() or golden_file(name).read_bytes() != data
        golden_file(name).write_bytes(data)
        print(f"{name}: {len(data.splitlines())} plans, {len(data)} bytes{', changed' if changed else ''}")
