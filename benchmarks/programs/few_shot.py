"""Few-shot question answering: subjects with five worked examples each, questions in any order (as in
MMLU)."""

from __future__ import annotations

import random
from typing import Any

import trunkline as sgl
from benchmarks.programs.shape import Shape, alone, correct, numbers, passage

SUBJECTS = 8


@sgl.function
def answer(s: Any, examples: str, question: str) -> None:
    s += sgl.system(examples)
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=16, temperature=0))


def run(rows: int) -> tuple[int, int]:
    examples = []
    for subject in range(SUBJECTS):
        pairs = [numbers(f"{subject}/{i}") for i in range(5)]
        shown = [f"What is {a} plus {b}? {a} + {b} = {a + b}" for a, b in pairs]
        examples.append(f"Chapter {subject}. {passage(subject, 60)}\n" + "\n".join(shown))
    data = []
    for i in range(rows):
        a, b = numbers(f"row {i}")
        row = {"examples": examples[i % SUBJECTS], "question": f"What is {a} plus {b}?"}
        data.append((row, f"= {a + b}"))
    random.Random(0).shuffle(data)
    states = answer.run_batch([row for row, _ in data])
    return correct([(state["answer"], expected) for state, (_, expected) in zip(states, data, strict=True)])


SHAPE = Shape("few-shot QA", run, 96)

if __name__ == "__main__":
    alone(SHAPE)
