"""Plans, carried out and judged, each step in two branches (as in tree of thought)."""

from __future__ import annotations

from typing import Any

import trunkline as sgl
from benchmarks.programs.shape import Shape, alone, correct, numbers, passage

WIDTH = 2


def branch(s: Any, request: str, name: str) -> list[Any]:
    forks = s.fork(WIDTH)
    for i, one in enumerate(forks):
        one += sgl.user(f"({i + 1}) {request}")
        one += sgl.assistant(sgl.gen(name, max_tokens=24, temperature=0))
    return list(forks)


@sgl.function
def solve(s: Any, a: int, b: int) -> list[Any]:
    s += sgl.system("Solve problems by plan, steps and judgment. " + passage("method", 200))
    s += sgl.user(f"The problem: how much is {a} plus {b}, and why?")
    leaves = []
    for plan in branch(s, "Say how to do it.", "plan"):
        for step in branch(plan, f"What is {a} plus {b}?", "step"):
            leaves += branch(step, f"What is {b} plus {a}?", "judged")
    return leaves


def run(rows: int) -> tuple[int, int]:
    problems = [numbers(f"tree {i}") for i in range(rows)]
    pairs = []
    for state, (a, b) in zip(solve.run_batch(problems), problems, strict=True):
        state.sync()
        pairs += [(leaf["judged"], f"= {a + b}") for leaf in state.ret_value]
    return correct(pairs)


SHAPE = Shape("tree of thought", run, 6)

if __name__ == "__main__":
    alone(SHAPE)
