"""An agent that thinks, acts and observes in turns, after worked examples (as in ReAct)."""

from __future__ import annotations

from typing import Any

import trunkline as sgl
from benchmarks.programs.shape import Shape, alone, passage

STEPS = 4
EXAMPLES = "\n\n".join(
    f"Question {i}: {passage(i, 30)}\nThought: look.\n"
    f"Action: search[{passage(i, 8)}]\nObservation: {passage(-i, 40)}"
    for i in range(8)
)


@sgl.function
def act(s: Any, question: str) -> None:
    s += EXAMPLES + "\n\nQuestion: " + question + "\n"
    for step in range(STEPS):
        s += "Thought:" + sgl.gen(f"thought{step}", max_tokens=12, stop="\n", temperature=0)
        s += "\nAction:" + sgl.gen(f"action{step}", max_tokens=12, stop="\n", temperature=0)
        s += f"\nObservation: {passage(s[f'action{step}'], 30)}\n"


def run(rows: int) -> tuple[int, int]:
    for state in act.run_batch([(passage(f"question {i}", 12),) for i in range(rows)]):
        state.sync()
    return 0, 0


SHAPE = Shape("ReAct agent", run, 8)

if __name__ == "__main__":
    alone(SHAPE)
