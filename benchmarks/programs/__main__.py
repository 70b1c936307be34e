"""`python -m benchmarks.programs`: every shape with the prefix cache on and off, longest prefix first and in
order of arrival. Exact counts, and times of this machine now."""

from __future__ import annotations

import argparse
import statistics
import sys
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


def main(words: list[str]) -> int:
    options = parser().parse_args(words)
    chosen = [one for one in SHAPES if not options.names or any(name in one.name for name in options.names)]
    results: dict[str, list[Measured]] = {}
    for label, flags in CONFIGURATIONS:
        with sgl.Engine(
            model_path=options.model,
            page_size=options.page_size,
            max_total_tokens=options.max_total_tokens,
            cpu_threads=options.cpu_threads,
            log_level="error",
            **flags,
        ) as engine:
            print(f"\n{label}")
            results[label] = []
            for shape in chosen:
                results[label].append(measure(shape, engine, options.rows))
                print("  " + results[label][-1].line(), flush=True)
    summary(results)
    differing = [
        runs[0].shape
        for runs in zip(*results.values(), strict=True)
        if len({(run.prompt_tokens, run.right) for run in runs}) > 1
    ]
    if differing:
        print(f"the cache or the order changed what was said: {', '.join(differing)}", file=sys.stderr)
    return 1 if differing else 0


def summary(results: dict[str, list[Measured]]) -> None:
    print("\ntime with the cache off / on (lpm), and hit rate / best hit rate")
    shares = []
    for off, on in zip(results["cache off"], results["lpm"], strict=True):
        shares.append(on.hit_rate / max(on.best_hit_rate, 1e-9))
        print(f"  {on.shape:<22} {off.seconds / on.seconds:5.2f} x   {shares[-1]:.3f}")
    if shares:
        mean = statistics.fmean(shares)
        print(f"  hit rates are {mean:.3f} of the best on average, {min(shares):.3f} at least")


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(prog="python -m benchmarks.programs", description=__doc__)
    words.add_argument("names", nargs="*", help="shapes, by a part of their name; all by default")
    words.add_argument("--model", help="a model folder; the bundled model by default")
    words.add_argument("--rows", type=int, help="rows of each program")
    words.add_argument("--page-size", type=int, default=1, help="tokens of a KV page, the unit of sharing")
    words.add_argument("--max-total-tokens", type=int, default=65536, help="tokens that the KV pool holds")
    words.add_argument("--cpu-threads", type=int, help="threads of the engine")
    return words


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
