"""What every program here offers, and how one is run alone."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trunkline as sgl

WORDS = (
    "garden river window bread stone light winter paper market bridge morning letter harbor candle forest "
    "copper island mirror kettle ladder meadow orchard pepper quarry ribbon saddle timber valley wagon yarn"
).split()


@dataclass(frozen=True)
class Shape:
    """A program and its data. `run(rows)` runs it on the default backend and returns how many of the answers
    that can be checked are right, and how many can be."""

    name: str
    run: Callable[[int], tuple[int, int]]
    rows: int


def passage(seed: int | str, words: int) -> str:
    """Text without meaning, the same for the same seed."""
    rng = random.Random(str(seed))
    sentences = []
    for _ in range(max(words // 8, 1)):
        one = [rng.choice(WORDS) for _ in range(6)]
        sentences.append(f"The {' '.join(one[:3])} is near the {' '.join(one[3:5])}.")
    return " ".join(sentences)


def numbers(seed: int | str) -> tuple[int, int]:
    """Two summands that the bundled model can add."""
    rng = random.Random(str(seed))
    return rng.randint(1, 12), rng.randint(1, 8)


def correct(pairs: Sequence[tuple[str, str]]) -> tuple[int, int]:
    """(answers that contain what was expected, answers)."""
    return sum(expected in answer for answer, expected in pairs), len(pairs)


def alone(shape: Shape) -> None:
    """Run a shape on the bundled model, or on the model folder that the command line names."""
    from benchmarks.programs.measure import measure

    folder = sys.argv[1] if len(sys.argv) > 1 else None
    with sgl.Engine(model_path=folder, log_level="error") as engine:
        print(measure(shape, engine).line())
