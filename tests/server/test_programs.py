"""The programs of `benchmarks/programs` run, and the prefix cache finds what they share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import trunkline as sgl
from benchmarks.programs.__main__ import SHAPES
from benchmarks.programs.measure import Recorder, measure
from benchmarks.programs.shape import Shape

# Shapes whose checkable answers the bundled model gets right, all of them.
CHECKED = ("few-shot QA", "JSON by regex", "JSON by schema", "chat, short answers", "retrieval pipeline")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    with sgl.Engine(page_size=1, max_total_tokens=32768, cpu_threads=1, log_level="error") as engine:
        yield engine


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_shape_finds_its_prefixes(shape: Shape, engine: Any) -> None:
    result = measure(shape, engine, rows=min(shape.rows, 16))
    assert result.calls >= 3
    assert result.prefill_tokens >= result.fewest_prefills
    assert result.hit_rate >= 0.9 * result.best_hit_rate
    if shape.name in CHECKED:
        assert result.right == result.checked >= 3


def test_the_best_hit_rate_counts_what_nobody_can_avoid(engine: Any) -> None:
    recorder = Recorder(engine)
    recorder._note([1, 2, 3], [4, 5])  # 4 is computed while 5 is generated
    recorder._note([1, 2, 3, 4, 6], [7])
    recorder._note([1, 2, 9], [])
    assert recorder.fewest_prefills() == 5  # 1 2 3 6 9
    assert (recorder.calls, recorder.prompt_tokens) == (3, 11)


def test_a_program_runs_alone() -> None:
    program = [sys.executable, "-m", "benchmarks.programs.retrieval"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("retrieval pipeline ") and "right 16/16" in done.stdout
