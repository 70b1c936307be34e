"""A retrieval pipeline: a query from the question, a passage for the query, an answer from the passage."""

from __future__ import annotations

from typing import Any

import trunkline as sgl
from benchmarks.programs.shape import Shape, alone, correct, passage

STEPS = 2
COLORS, THINGS = ("red", "green", "blue", "white"), ("box", "door", "bag", "safe")
INSTRUCTION = "Answer questions in steps. " + passage("instruction", 120)


@sgl.function
def answer(s: Any, thing: str, code: int) -> None:
    s += sgl.system(INSTRUCTION)
    for step in range(STEPS):
        with s.copy() as search:
            search += sgl.user(f"Step {step + 1}: what should we look up to find the code for the {thing}?")
            search += sgl.assistant(sgl.gen("query", max_tokens=16, temperature=0))
        s += sgl.user(f"Found for {search['query']}: {passage(f'{thing}{step}', 60)}")
        s += sgl.assistant("Okay, I will remember that.")
    s += sgl.user(f"The code for the {thing} is {code}.\n\nQuestion: What is the code for the {thing}?")
    s += sgl.assistant(sgl.gen("answer", max_tokens=24, temperature=0))


def run(rows: int) -> tuple[int, int]:
    data = [(f"{COLORS[i % 4]} {THINGS[i // 4 % 4]}", 100 + 37 * i) for i in range(rows)]
    states = answer.run_batch(data)
    return correct([(state["answer"], str(code)) for state, (_, code) in zip(states, data, strict=True)])


SHAPE = Shape("retrieval pipeline", run, 16)

if __name__ == "__main__":
    alone(SHAPE)
