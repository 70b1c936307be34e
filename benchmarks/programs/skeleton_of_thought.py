"""A list of points first, then all points written out at once, then put together (as in skeleton of
thought)."""

from __future__ import annotations

from typing import Any

import trunkline as sgl
from benchmarks.programs.shape import Shape, alone, passage

POINTS = 4


@sgl.function
def write(s: Any, topic: str) -> None:
    s += "Write a short text from points. " + passage("guide", 80) + f"\nTopic: {topic}\nPoints:"
    for i in range(POINTS):
        s += f"\n{i + 1}." + sgl.gen(f"point{i}", max_tokens=8, stop="\n", temperature=0)
    forks = s.fork(POINTS)
    for i, one in enumerate(forks):
        one += f"\nPoint {i + 1} written out:" + sgl.gen("text", max_tokens=32, stop="\n", temperature=0)
    forks.join()
    s += "\nAll together:" + "".join(s["text"]) + "\nTitle:"
    s += sgl.gen("title", max_tokens=8, stop="\n", temperature=0)


def run(rows: int) -> tuple[int, int]:
    for state in write.run_batch([(passage(f"topic {i}", 8),) for i in range(rows)]):
        state.sync()
    return 0, 0


SHAPE = Shape("skeleton of thought", run, 16)

if __name__ == "__main__":
    alone(SHAPE)
