"""`python -m benchmarks.programs`: every shape with the prefix cache on and off, longest prefix first and in
order of arrival. Exact counts, and times of this machine now."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import trunkline as sgl
from benchmarks.programs import (
    agent,
    chat,
    few_shot,
    generative_agents,
    json_output,
    judge,
    multi_document,
    retrieval,
    select_ending,
    skeleton_of_thought,
    tree_of_thought,
)
from benchmarks.programs.measure import Measured, measure
from benchmarks.programs.shape import Shape

SHAPES: tuple[Shape, ...] = (
    few_shot.SHAPE,
    select_ending.SHAPE,
    agent.SHAPE,
    generative_agents.SHAPE,
    tree_of_thought.SHAPE,
    skeleton_of_thought.SHAPE,
    judge.SHAPE,
    json_output.REGEX_SHAPE,
    json_output.SCHEMA_SHAPE,
    chat.SHORT,
    chat.LONG,
    retrieval.SHAPE,
    multi_document.SHAPE,
)
CONFIGURATIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("cache off", {"disable_radix_cache": True}),
    ("fcfs", {"schedule_policy": "fcfs"}),
    ("lpm", {"schedule_policy": "lpm"}),
)

# Of one shape: configuration -> its runs, one a round.
Rounds = dict[str, list[Measured]]


def main(words: list[str]) -> int:
    options = parser().parse_args(words)
    chosen = [one for one in SHAPES if not options.names or any(name in one.name for name in options.names)]
    if not chosen:
        print(f"no shape has {' or '.join(options.names)} in its name", file=sys.stderr)
        return 2
    with ExitStack() as stack:
        engines = start(options, stack)
        results = [run(shape, engines, options) for shape in chosen]
    if options.json:
        print(json.dumps({"bench": "programs", "runs": [line for one in results for line in records(one)]}))
    else:
        summary(results)
    differing = [
        next(iter(one.values()))[0].shape
        for one in results
        if len({(run.prompt_tokens, run.right) for runs in one.values() for run in runs}) > 1
    ]
    if differing:
        print(f"the cache or the order changed what was said: {', '.join(differing)}", file=sys.stderr)
    return 1 if differing else 0


def start(options: argparse.Namespace, stack: ExitStack) -> dict[str, sgl.Engine]:
    """An engine for each configuration, closed with the stack."""
    common = {
        "model_path": options.model_path,
        "page_size": options.page_size,
        "max_total_tokens": options.max_total_tokens,
        "cpu_threads": options.cpu_threads,
        "log_level": "error",
    }
    return {label: stack.enter_context(sgl.Engine(**common, **flags)) for label, flags in CONFIGURATIONS}


def run(shape: Shape, engines: dict[str, sgl.Engine], options: argparse.Namespace) -> Rounds:
    """Configurations alternate, so that what else the machine does slows them alike."""
    found: Rounds = {label: [] for label in engines}
    for _ in range(options.rounds):
        for label, engine in engines.items():
            found[label].append(measure(shape, engine, options.rows))
            if not options.json:
                print(f"{label:<9}  {found[label][-1].line()}", flush=True)
    return found


def records(found: Rounds) -> list[dict[str, Any]]:
    """One for each configuration: counts of the round that prefilled most, seconds of all rounds."""
    return [
        {
            "configuration": label,
            **asdict(worst),
            "hit_rate": round(worst.hit_rate, 4),
            "best_hit_rate": round(worst.best_hit_rate, 4),
            "seconds": [round(one.seconds, 3) for one in rounds],
        }
        for label, rounds in found.items()
        for worst in [max(rounds, key=lambda one: one.prefill_tokens)]
    ]


def summary(results: list[Rounds]) -> None:
    print("\ntime with the cache off / on (lpm), in order of arrival / lpm; hit rate / best hit rate (lpm)")
    shares = []
    for found in results:
        worst = max(found["lpm"], key=lambda one: one.prefill_tokens)
        shares.append(worst.hit_rate / max(worst.best_hit_rate, 1e-9))
        off, fcfs = ratio(found["cache off"], found["lpm"]), ratio(found["fcfs"], found["lpm"])
        print(f"  {worst.shape:<22} {off:5.2f} x  {fcfs:5.2f} x   {shares[-1]:.3f}")
    print(
        f"  hit rates are {statistics.fmean(shares):.3f} of the best on average, {min(shares):.3f} at least"
    )


def ratio(one: list[Measured], other: list[Measured]) -> float:
    """Of seconds, the median of the rounds."""
    return statistics.median(a.seconds / b.seconds for a, b in zip(one, other, strict=True))


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(prog="python -m benchmarks.programs", description=__doc__)
    words.add_argument("names", nargs="*", help="shapes, by a part of their name; all by default")
    words.add_argument("--model-path", help="a model folder; the bundled model by default")
    words.add_argument("--rounds", type=int, default=1, help="runs of each; times are medians")
    words.add_argument("--json", action="store_true", help="print one line of JSON, and nothing else")
    words.add_argument("--rows", type=int, help="rows of each program")
    words.add_argument("--page-size", type=int, default=1, help="tokens of a KV page, the unit of sharing")
    words.add_argument("--max-total-tokens", type=int, default=65536, help="tokens that the KV pool holds")
    words.add_argument("--cpu-threads", type=int, help="threads of the engine")
    return words


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
