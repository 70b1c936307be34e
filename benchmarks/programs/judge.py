"""An essay judged along six dimensions at once, then a summary and a grade (as in branch-solve-merge)."""

from __future__ import annotations

from typing import Any

import trunkline as sgl
from benchmarks.programs.shape import Shape, alone, passage

DIMENSIONS = ("clarity", "originality", "evidence", "structure", "style", "relevance")


@sgl.function
def judge(s: Any, essay: str) -> None:
    s += "You judge essays. Be fair.\nEssay: " + essay + "\n"
    forks = s.fork(len(DIMENSIONS))
    for one, dimension in zip(forks, DIMENSIONS, strict=True):
        one += f"Judge its {dimension}:" + sgl.gen("judgment", max_tokens=24, stop="\n", temperature=0)
    forks.join()
    for dimension, judgment in zip(DIMENSIONS, s["judgment"], strict=True):
        s += f"{dimension}:{judgment}\n"
    s += "In short:" + sgl.gen("summary", max_tokens=16, stop="\n", temperature=0)
    s += "\nGrade: " + sgl.select("grade", ["A", "B", "C", "D"])


def run(rows: int) -> tuple[int, int]:
    for state in judge.run_batch([(passage(f"essay {i}", 150),) for i in range(rows)]):
        assert state["grade"] in "ABCD"
    return 0, 0


SHAPE = Shape("LLM judge", run, 12)

if __name__ == "__main__":
    alone(SHAPE)
