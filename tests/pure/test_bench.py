"""The benchmarks: what they report, counted on a tiny model or a stub. Nothing here asserts a time."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trunkline.bench import constrained, kernels
from trunkline.bench.offline import Options as OfflineOptions
from trunkline.bench.offline import Timeline, timed, with_pool
from trunkline.bench.report import percentile, random_prompts, rate, show, spread
from trunkline.bench.startup import Options as StartupOptions
from trunkline.bench.startup import measure as measure_start
from trunkline.bench.startup import phases_of
from trunkline.bench.startup import report as report_starts
from trunkline.cli.main import main
from trunkline.cli.make_model import make_model
from trunkline.config.cli import parse
from trunkline.config.resolve import load_config

ISSUE_FIELDS = {
    "load_s", "steps", "prompt_tokens", "cached_tokens", "output_tokens", "total_s", "prefill_tokens_per_s",
    "decode_tokens_per_s", "output_tokens_per_s", "peak_rss_bytes", "version", "model", "config",
}  # fmt: skip
SPREAD = {"mean_ms", "p50_ms", "p90_ms", "p95_ms", "p99_ms"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model("tiny", folder)
    return folder


# ---------------------------------------------------------------------- arithmetic
def test_percentiles_interpolate() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([1.0], 99) == 1.0 and percentile([], 50) is None
    assert percentile([0.0, 10.0], 95) == 9.5
    assert spread("x", [0.001, 0.003]) == {
        "x_mean_ms": 2.0, "x_p50_ms": 2.0, "x_p90_ms": 2.8, "x_p95_ms": 2.9, "x_p99_ms": 2.98,
    }  # fmt: skip
    assert set(spread("x", []).values()) == {None}
    assert rate(10, 4.0) == 2.5 and rate(0, 1.0) is None and rate(1, 0.0) is None


def test_prompts_share_exactly_the_prefix() -> None:
    prompts = random_prompts(3, 5, 7, 1000, seed=1)
    assert prompts == random_prompts(3, 5, 7, 1000, seed=1) != random_prompts(3, 5, 7, 1000, seed=2)
    assert all(len(p) == 12 and p[:7] == prompts[0][:7] and max(p) < 985 for p in prompts)
    assert len({tuple(p[7:]) for p in prompts}) == 3


def test_rates_split_where_the_last_request_got_its_first_token() -> None:
    early = Timeline(
        first=1.0, last=4.0, gaps=[1.0, 1.0, 1.0], arrivals=[(1.0, 1), (2.0, 1), (3.0, 1), (4.0, 1)]
    )
    late = Timeline(first=2.0, last=4.0, gaps=[2.0], arrivals=[(2.0, 1), (4.0, 3)])
    found = timed([early, late], 4.0, computed_prompt=50)
    assert found["prefill_tokens_per_s"] == 25.0
    assert found["decode_tokens_per_s"] == 2.5  # 1 + 1 + 3 tokens in two seconds
    assert found["output_tokens_per_s"] == 2.0
    assert found["ttft_mean_ms"] == 1500.0 and found["itl_mean_ms"] == 1250.0
    assert timed([Timeline(first=1.0, arrivals=[(1.0, 1)])], 1.0, 10)["decode_tokens_per_s"] is None


def test_results_are_shown_as_one_line_or_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    show({"a": 1234, "b": None, "config": {}}, as_json=True)
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and json.loads(line)["a"] == 1234
    show({"a": 1234, "b": None, "config": {}}, as_json=False)
    text = capsys.readouterr().out
    assert "1,234" in text and "config" not in text and "b " not in text


# ---------------------------------------------------------------------- offline
def test_offline_reports_every_field_and_exact_counts(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "bench offline --json --num-prompts 3 --input-len 20 --output-len 4 --shared-prefix-len 32 --seed 3"
    )
    flags = [
        "--model-path",
        str(tiny),
        "--max-total-tokens",
        "1024",
        "--cpu-threads",
        "1",
        "--page-size",
        "8",
    ]
    assert main([*words.split(), *flags]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) >= ISSUE_FIELDS | {f"{name}_{part}" for name in ("ttft", "itl") for part in SPREAD}
    assert result["prompt_tokens"] == 3 * 52 and result["output_tokens"] == 12
    assert result["cached_tokens"] == 2 * 32  # computed once, whoever came first
    assert result["computed_tokens"] == 3 * 52 - 64 + 3 * 3
    assert result["config"]["cache"]["page_size"] == 8 and result["model"] == str(tiny)
    assert min(result[name] for name in ("load_s", "total_s", "steps", "peak_rss_bytes", "ttft_p50_ms")) > 0


def test_offline_sizes_the_pool_for_the_workload_unless_told() -> None:
    options = OfflineOptions(num_prompts=3, input_len=20, output_len=4, shared_prefix_len=32, page_size=8)
    assert with_pool(options).max_total_tokens == 3 * 9 * 8
    for given in ({"max_total_tokens": 64}, {"kv_memory": 1 << 20}, {"mem_fraction_static": 0.5}):
        sized = replace(options, **given)  # type: ignore[arg-type]
        assert with_pool(sized) is sized


def test_offline_tells_what_cannot_run(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "offline", "--model-path", str(tiny), "--max-total-tokens", "256", "--cpu-threads", "1"]
    assert main([*words, "--input-len", "300", "--num-prompts", "1"]) == 2
    assert "300" in capsys.readouterr().err


# ---------------------------------------------------------------------- kernels
def test_kernels_report_every_shape(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "COLD_BYTES", 1 << 16)
    monkeypatch.setattr(kernels, "LINEAR_SIZES", ((32, 64),))
    monkeypatch.setattr(kernels, "ROWS", (1, 4))
    monkeypatch.setattr(kernels, "ATTENTION_SHAPES", ((2, 1, 40, 32), (1, 8, 16, 0)))
    monkeypatch.setattr(kernels, "VOCABULARY", 300)
    monkeypatch.setattr(kernels, "SAMPLING_ROWS", (3,))
    words = ["bench", "kernels", "--seconds", "0.001", "--cpu-threads", "1", "--dtype", "float32"]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(p["n"], p["k"], p["m"]) for p in result["linear"]] == [(32, 64, 1), (32, 64, 4)]
    assert [p["requests"] for p in result["attention"]] == [2, 1]
    assert [p["how"] for p in result["sampling"]] == list(kernels.SAMPLING)
    assert [p["logits"] for p in result["head"]] == ["written", "none"] * 2
    for point in result["linear"] + result["attention"] + result["sampling"] + result["head"]:
        assert point["us"] > 0 and point["of_limit"] >= 0
    assert result["read_gb_per_s"] > 0 and result["peak_gflop_per_s"] > 0
    assert main(words) == 0
    assert "of_limit" in capsys.readouterr().out


# ---------------------------------------------------------------------- scheduler
@pytest.mark.parametrize("temperature", ["0", "1"])
def test_the_scheduler_s_share_of_a_step(
    tiny: Path, capsys: pytest.CaptureFixture[str], temperature: str
) -> None:
    words = ["bench", "scheduler", "--model-path", str(tiny), "--rows", "40", "--steps", "3", "--json"]
    words += ["--chunked-prefill-size", "48"]
    assert main([*words, "--temperature", temperature]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["rows"] == 40 and result["steps"] == 3 and 0 < result["share"] < 1
    assert 0 < result["beside_model_ms"] < result["step_ms"]


def test_rows_that_do_not_fit_are_told(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "scheduler", "--model-path", str(tiny), "--rows", "5", "--max-running-requests", "3"]
    assert main([*words, "--json"]) != 0
    assert "of 5 rows decoded in a step" in capsys.readouterr().err


# ---------------------------------------------------------------------- startup
def test_phases_of_a_start_add_up() -> None:
    info = {"import_s": 0.5, "map_s": 0.1, "pack_s": 0.4, "load_s": 0.7}
    phases = phases_of(0.2, 1.7, 1.8, info)
    assert phases == pytest.approx(
        {
            "server_s": 0.2,
            "import_s": 0.5,
            "map_s": 0.1,
            "pack_s": 0.4,
            "core_s": 0.2,
            "rest_s": 0.3,
            "answer_s": 0.1,
        }
    )
    assert sum(phases.values()) == pytest.approx(1.8)


@pytest.mark.slow
def test_the_memory_plan_bounds_what_a_start_takes(tmp_path: Path) -> None:
    """Weights are in memory once, also while they load: a second copy is more than may be extra."""
    folder = tmp_path / "model"
    make_model("qwen3-0.6b", folder)
    options = parse(["--model-path", str(folder), "--max-total-tokens", "1024"], StartupOptions)
    resolved = load_config(options)
    start = asyncio.run(measure_start(options))
    found: dict[str, Any] = report_starts(resolved, [start])
    assert found["first_token_s"] >= found["ready_s"] > 0
    assert 0 < found["extra_bytes"] < 500_000_000 < found["weight_bytes"]
    assert start.peak_rss_bytes < resolved.memory.needed
    assert found["phases"]["pack_s"] > 0 and min(found["phases"].values()) >= 0


# ---------------------------------------------------------------------- grammar
def test_grammar_compares_with_engines(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constrained, "INPUT", 8)
    monkeypatch.setattr(constrained, "HOSTILE", (("regex", "(" * 5000 + ")" * 5000),))
    words = ["bench", "grammar", "--model-path", str(tiny), "--repeat", "1", "--rounds", "1", "--json"]
    assert main([*words, "--rows", "2", "--tokens", "200", "--throughput", "--hostile"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["throughput"]["constrained_over_free"] > 0 and found["throughput"]["jump_over_free"] > 0
    assert 0 < found["throughput"]["forced_share"] < 1
    assert found["hostile"]["hostile_refused"] == found["hostile"]["hostile_answers"] > 0
    assert found["hostile"]["step_p99_ratio"] > 0


def test_grammar_reports_every_constraint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "grammar", "--repeat", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in result["constraints"]] == ["json_schema", "json_object", "regex", "ebnf"]
    for row in result["constraints"]:
        assert 0 < row["mask_p50"] <= row["mask_p90"] <= row["mask_p99"]
        assert row["compile_ms"] > 0
