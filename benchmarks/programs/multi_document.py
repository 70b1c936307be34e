"""Several questions to the same few documents, each question in a branch of its own."""

from __future__ import annotations

from typing import Any

import trunkline as sgl
from benchmarks.programs.shape import Shape, alone, correct, passage

KEYS = ("red box", "green door", "blue bag", "white safe")


@sgl.function
def read(s: Any, topic: int) -> None:
    documents = [
        f"{passage(f'{topic}/{i}', 50)} The code for the {key} is {code(topic, i)}."
        for i, key in enumerate(KEYS)
    ]
    s += sgl.user("Here is a text:\n" + " ".join(documents))
    s += sgl.assistant("Okay, I will remember that.")
    forks = s.fork(len(KEYS))
    for one, key in zip(forks, KEYS, strict=True):
        one += sgl.user(f"What is the code for the {key}?")
        one += sgl.assistant(sgl.gen("answer", max_tokens=24, temperature=0))
    forks.join()


def code(topic: int, i: int) -> int:
    return 100 + 37 * topic + i


def run(rows: int) -> tuple[int, int]:
    pairs = []
    for topic, state in enumerate(read.run_batch([(topic,) for topic in range(rows)])):
        pairs += [(answer, str(code(topic, i))) for i, answer in enumerate(state["answer"])]
    return correct(pairs)


SHAPE = Shape("multi-document QA", run, 12)

if __name__ == "__main__":
    alone(SHAPE)
