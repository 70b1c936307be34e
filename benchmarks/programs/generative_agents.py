"""Inhabitants of a town: each has a memory, and is asked short questions about it (as in generative
agents)."""

from __future__ import annotations

from typing import Any

import trunkline as sgl
from benchmarks.programs.shape import Shape, alone, passage

PEOPLE = 8
TASKS = (
    "What does it do next?",
    "Whom does it meet?",
    "How important is this, from 1 to 10?",
    "What is new?",
)


@sgl.function
def ask(s: Any, person: int, task: str, event: str) -> None:
    s += "You live in a small town. " + passage("town", 80)
    s += f"\nThis is what inhabitant {person} remembers: {passage(person, 120)}"
    s += f"\n{task}\nEvent: {event}\nAnswer:" + sgl.gen("answer", max_tokens=12, stop="\n", temperature=0)


def run(rows: int) -> tuple[int, int]:
    data = [
        {"person": i % PEOPLE, "task": TASKS[i // PEOPLE % len(TASKS)], "event": passage(f"event {i}", 8)}
        for i in range(rows)
    ]
    for state in ask.run_batch(data):
        state.sync()
    return 0, 0


SHAPE = Shape("generative agents", run, 64)

if __name__ == "__main__":
    alone(SHAPE)
