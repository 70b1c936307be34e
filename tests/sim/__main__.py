"""`python -m tests.sim`: many random cases, one case in detail, the planted bugs, or new recorded plans."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from tqdm import tqdm  # type: ignore[import-untyped]

from tests.sim import replay
from tests.sim.cases import Case, make_case
from tests.sim.mutations import MUTATIONS, catch
from tests.sim.runner import describe, run_case, run_chunk
from tests.sim.shrink import shrink
from trunkline.scheduler.plan import StepPlan

CHUNK = 50  # cases handed to a process at once
MAX_SHOWN = 5  # failing cases shown in full


def _results(chunks: list[range], jobs: int) -> Iterator[tuple[Counter[str], list[tuple[int, str]]]]:
    if jobs == 1:
        yield from map(run_chunk, chunks)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(run_chunk, chunks)


def run_many(cases: int, seed: int, jobs: int, as_json: bool) -> int:
    chunks = [range(at, min(at + CHUNK, seed + cases)) for at in range(seed, seed + cases, CHUNK)]
    counts: Counter[str] = Counter()
    failed: list[tuple[int, str]] = []
    started = time.monotonic()
    with tqdm(total=cases, unit="case", file=sys.stderr, mininterval=0.5, dynamic_ncols=True) as bar:
        for (found, bad), chunk in zip(_results(chunks, jobs), chunks, strict=True):
            counts += found
            for case_seed, what in bad[: max(0, MAX_SHOWN - len(failed))]:
                bar.write(
                    f"case {case_seed} failed: {what}\n{_outline(make_case(case_seed))}", file=sys.stderr
                )
            failed += bad
            bar.update(len(chunk))
            bar.set_postfix(failed=len(failed))
    seconds = time.monotonic() - started
    if as_json:
        record = {
            "cases": cases,
            "seed": seed,
            "failed": [case for case, _ in failed],
            "seconds": round(seconds, 2),
        }
        print(json.dumps({**record, "cases_per_s": round(cases / seconds, 1), "counts": dict(counts)}))
    else:
        print(f"{cases} cases in {seconds:.1f} s ({cases / seconds:.0f}/s), {len(failed)} failed")
        print(", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
        if failed:
            print(f"one in detail: python -m tests.sim --case {failed[0][0]} [--shrink]")
    return 1 if failed else 0


def _outline(case: Case) -> str:
    return (
        f"  {case.scheduler}\n  pages={case.num_pages}x{case.page_size} cache={case.prefix_cache} "
        f"drafts={case.num_drafts} requests={len(case.submissions)} breaks={case.breaks} exact={case.exact}"
    )


def run_one(seed: int, smaller: bool) -> int:
    """Run one case with every plan on stdout."""
    case = make_case(seed)
    if smaller:
        case = shrink(case)
    print(_outline(case))
    for entry in case.submissions:
        print(f"  {entry}")
    try:
        counts = run_case(case, trace=lambda plan: print(_plan_line(plan)))
    except Exception as error:
        print(f"FAILED: {describe(error)}")
        return 1
    print(dict(counts))
    return 0


def _plan_line(plan: StepPlan) -> str:
    admits = [
        (admit.row, admit.rid, f"{admit.computed}/{len(admit.token_ids)}", admit.pages)
        for admit in plan.admits
    ]
    changes = [(change.row, change.start, change.pages) for change in plan.new_pages]
    rows = [
        f"{row.row}:{row.q_len}" + f"+{row.num_drafts}d" * bool(row.num_drafts) + "s" * row.samples
        for row in plan.rows
    ]
    return f"step {plan.step}: retires {plan.retires} admits {admits} pages {changes} rows {' '.join(rows)}"


def run_mutations(cases: int) -> int:
    """Table of planted bugs, and what caught them."""
    missed = 0
    print("caught after so many cases: by all checks, by outputs alone (no invariants, a worker that trusts)")
    for mutation in MUTATIONS:
        found = catch(mutation, cases)
        seen = catch(mutation, min(cases, 300), strict=False)
        missed += found is None
        after, what = found or ("missed", "")
        print(f"{mutation.name:26} {after!s:>6} {seen[0] if seen else '-'!s:>6}  {mutation.bug}")
        print(f"{'':42}{what[:110]}", flush=True)
    print(f"{len(MUTATIONS) - missed} of {len(MUTATIONS)} caught")
    return 1 if missed else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--cases", type=int, default=2000, help="how many (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others count up from it")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON line on stdout")
    parser.add_argument("--case", type=int, metavar="SEED", help="run one case and print its plans")
    parser.add_argument(
        "--shrink", action="store_true", help="with --case: make the failing case smaller first"
    )
    parser.add_argument(
        "--mutations", action="store_true", help="plant each known bug and say what catches it"
    )
    parser.add_argument("--record", action="store_true", help="write tests/sim/golden/ anew")
    args = parser.parse_args()
    if args.record:
        replay.record_all()
        return 0
    if args.mutations:
        return run_mutations(args.cases)
    if args.case is not None:
        return run_one(args.case, args.shrink)
    return run_many(args.cases, args.seed, args.jobs, args.json)


if __name__ == "__main__":
    sys.exit(main())
