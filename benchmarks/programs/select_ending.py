"""The likeliest of four endings after shared examples (as in HellaSwag)."""

from __future__ import annotations

from typing import Any

import trunkline as sgl
from benchmarks.programs.shape import WORDS, Shape, alone, passage

EXAMPLES = "\n".join(f"Story: {passage(i, 40)} End: the {WORDS[i]}." for i in range(20))


@sgl.function
def finish(s: Any, story: str, endings: list[str]) -> None:
    s += EXAMPLES + "\nStory: " + story + " End:"
    s += sgl.select("ending", endings)


def run(rows: int) -> tuple[int, int]:
    data = [
        {
            "story": passage(f"story {i}", 16),
            "endings": [f" the {WORDS[(i * 7 + k) % len(WORDS)]}." for k in range(4)],
        }
        for i in range(rows)
    ]
    states = finish.run_batch(data)
    for state, row in zip(states, data, strict=True):
        assert state["ending"] in row["endings"]
    return 0, 0


SHAPE = Shape("select an ending", run, 12)

if __name__ == "__main__":
    alone(SHAPE)
