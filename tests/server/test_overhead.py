"""The benchmark of the API server alone runs the real server over an engine that computes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trunkline.bench import overhead


@pytest.mark.parametrize("route", ["chat", "generate"])
def test_overhead(tiny_model: Path, capsys: pytest.CaptureFixture[str], route: str) -> None:
    words = ["--model-path", str(tiny_model), "--streams", "3", "--tokens", "8", "--lone", "2"]
    assert overhead.run([*words, "--route", route, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["route"], result["tokens"]) == (route, 24)
    assert result["tokens_per_s"] > 0 and result["ttft_p50_ms"] > 0
