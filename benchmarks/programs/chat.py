"""Conversations of four turns, with short and with long answers."""

from __future__ import annotations

from typing import Any

import trunkline as sgl
from benchmarks.programs.shape import Shape, alone, correct, numbers, passage

TURNS = 4


@sgl.function
def talk(s: Any, user: int, length: int) -> None:
    for turn in range(TURNS):
        a, b = numbers(f"{user}/{turn}")
        s += sgl.user(f"{passage(f'{user}/{turn}', 24)} What is {a} plus {b}?")
        s += sgl.assistant(
            sgl.gen(
                f"answer{turn}",
                max_tokens=length,
                min_tokens=length // 2,
                temperature=0,
                ignore_eos=length > 32,
            )
        )


def run_with(length: int, rows: int) -> tuple[int, int]:
    states = talk.run_batch([{"user": i, "length": length} for i in range(rows)])
    pairs = []
    for i, state in enumerate(states):
        for turn in range(TURNS):
            pairs.append((state[f"answer{turn}"], f"= {sum(numbers(f'{i}/{turn}'))}"))
    return correct(pairs)


SHORT = Shape("chat, short answers", lambda rows: run_with(16, rows), 24)
LONG = Shape("chat, long answers", lambda rows: run_with(128, rows), 12)

if __name__ == "__main__":
    alone(SHORT)
    alone(LONG)
