"""The side-by-side benchmark without any peer: order of runs, figures, error lines, table, command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.__main__ import main
from benchmarks.peers.engines import trunkline
from benchmarks.peers.engines.program import Timeline
from benchmarks.peers.environments import ENGINES, HERE, PEERS, Environments, last_line, weights_bytes
from benchmarks.peers.report import read, table
from benchmarks.peers.rounds import Plan, job_of, reason, run_all, run_program, version_of
from benchmarks.peers.workloads import WORKLOADS, Job, Outcome, RunError, figure_of
from trunkline.bench.offline import Options
from trunkline.bench.report import random_prompts
from trunkline.config.cli import parse

CONFIG = {"vocab_size": 1000, "head_dim": 4, "num_hidden_layers": 3, "num_key_value_heads": 2}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(bytes(100))
    return folder


def plan(model: Path, **changes: Any) -> Plan:
    return Plan(**{"workloads": ["a"], "engines": ["trunkline"], "repeat": 1, "model": model, **changes})


def outcome(job: Job, **changes: Any) -> Outcome:
    fields = {
        "version": "1",
        "tokens": [job.output_len] * len(job.prompts),
        "first_s": 0.5,
        "total_s": 2.0,
        "kv_bytes": 10_000_000,
        "first_token_at": 107.0,
        "peak_rss_bytes": 50_000_000,
    }
    return Outcome(**{**fields, **changes})


def result(engine: str, workload: str, value: float | None = None, **more: object) -> dict[str, object]:
    found: dict[str, object] = {
        "date": "2026-03-04T05:06:07+00:00",
        "machine": "Some CPU, 2 cores",
        "threads": 2,
        "engine": engine,
        "version": "1.2",
        "workload": workload,
        **more,
    }
    return found if value is None else {**found, "value": value}


def test_engines_take_turns_within_each_workload_of_each_round(model: Path) -> None:
    runs = plan(model, workloads=["a", "c"], engines=["trunkline", "vllm"], repeat=2).runs()
    names = [(workload.name, engine) for workload, engine in runs]
    once = [("a", "trunkline"), ("a", "vllm"), ("c", "trunkline"), ("c", "vllm")]
    assert names == once * 2


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_job_holds_the_prompts_of_the_offline_benchmark(model: Path, name: str) -> None:
    workload = WORKLOADS[name]
    job = job_of(workload, plan(model, seed=7), model, threads=2)
    assert job.prompts == random_prompts(workload.requests, workload.own, workload.shared, 1000, 7)
    assert len({tuple(prompt[workload.shared :]) for prompt in job.prompts}) == workload.requests
    assert job.longest == workload.shared + workload.own + workload.output_len
    assert job.kv_bytes_per_token == 2 * 2 * 3 * 2 * 4
    assert job.warmup != job.prompts[0]
    assert bool(job.warmup) == (name != "f"), "only the start is measured cold"
    assert Job(**json.loads(json.dumps(vars(job)))) == job


@pytest.mark.parametrize("name", [name for name, row in WORKLOADS.items() if row.weights == "bf16"])
def test_trunkline_is_asked_for_the_same_workload(model: Path, name: str) -> None:
    workload = WORKLOADS[name]
    job = job_of(workload, plan(model, seed=3), model, threads=2)
    words = trunkline.bench_words(job, workload)
    assert words[:2] == ["bench", "offline"]
    options = parse(words[2:], Options)
    asked = (options.num_prompts, options.shared_prefix_len, options.input_len, options.output_len)
    assert asked == (workload.requests, workload.shared, workload.own, workload.output_len)
    assert (options.seed, options.json) == (3, True)


def test_quantised_workloads_pass_the_flag_on(model: Path) -> None:
    for name, weights in (("a8", "int8"), ("b8", "int8"), ("c8", "int8"), ("a4", "int4")):
        words = trunkline.bench_words(job_of(WORKLOADS[name], plan(model), model, 2), WORKLOADS[name])
        assert words[words.index("--quantization") + 1] == weights


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a", 127 / 1.5),
        ("b", 1024 / 0.5),
        ("c", 32 * 128 / 2.0),
        ("d", 2.0),
        ("f", 7.0),
        ("g", 50 - 10 - 20),
    ],
)
def test_figures(model: Path, name: str, expected: float) -> None:
    job = job_of(WORKLOADS[name], plan(model), model, 2)
    assert figure_of(job, outcome(job), 100.0, 20_000_000) == pytest.approx(expected)


def test_the_start_of_a_server_is_that_of_its_own_process(model: Path) -> None:
    job = job_of(WORKLOADS["f"], plan(model), model, 2)
    assert figure_of(job, outcome(job, started_at=104.0), 100.0, 0) == pytest.approx(3.0)


@pytest.mark.parametrize("tokens", [[127], [129], [], [64, 64]])
def test_a_wrong_number_of_tokens_is_an_error(model: Path, tokens: list[int]) -> None:
    job = job_of(WORKLOADS["a"], plan(model), model, 2)
    with pytest.raises(RunError, match="instead of 1 x 128"):
        figure_of(job, outcome(job, tokens=tokens), 0.0, 0)


def test_a_timeline_counts_tokens_of_each_request() -> None:
    timeline = Timeline(2)
    for request, tokens in ((0, 1), (1, 2), (0, 3)):
        timeline.note(request, tokens)
    found = timeline.outcome("1", 5, first_token_at=None)
    assert found.tokens == [4, 2]
    assert 0 <= found.first_s <= found.total_s
    assert timeline.outcome("1", 5, first_token_at=9.0).first_token_at == 9.0


def test_what_is_not_installed_gives_an_error_line_and_the_rest_goes_on(model: Path, tmp_path: Path) -> None:
    found = list(run_all(plan(model, engines=["vllm", "openvino"], repeat=2), Environments(tmp_path)))
    assert [line["engine"] for line in found] == ["vllm", "openvino"] * 2
    for line in found:
        assert line["error"] == f"not installed: run `python -m benchmarks.peers setup {line['engine']}`"
        assert "value" not in line


@pytest.fixture
def fake(tmp_path: Path) -> Environments:
    """An environment whose vLLM is a program that fails as its model's name says."""
    python = tmp_path / "vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"#!{sys.executable}\n"
        "import json, sys, time\n"
        "job = json.load(sys.stdin)\n"
        "if job['model'] == 'sleep': time.sleep(60)\n"
        "print('loading', file=sys.stderr)\n"
        "sys.exit('no such layer: 7')\n"
    )
    python.chmod(0o755)
    return Environments(tmp_path)


def test_a_program_that_fails_is_quoted(fake: Environments, model: Path) -> None:
    job = job_of(WORKLOADS["a"], plan(model), model, 2)
    with pytest.raises(RunError, match=r"^ended with status 1: no such layer: 7$"):
        run_program("vllm", fake, job, timeout=30)


def test_a_program_that_hangs_is_ended(fake: Environments, model: Path) -> None:
    job = job_of(WORKLOADS["a"], plan(model), Path("sleep"), 2)
    with pytest.raises(RunError, match=r"took more than 0\.5 s"):
        run_program("vllm", fake, job, timeout=0.5)


def test_a_refused_quantisation_is_told_from_a_fault() -> None:
    said = "trunkline bench: error: --quantization is not supported: not built yet\n"
    assert reason(said, 2) == "not available: --quantization is not supported: not built yet"
    assert reason("", -9) == "ended with status -9: no output"


def test_weights_that_a_package_does_not_have_are_an_error(model: Path, tmp_path: Path) -> None:
    environments = Environments(tmp_path)
    stamp = environments.stamp("vllm")
    stamp.parent.mkdir()
    stamp.write_text((HERE / "locks" / "vllm.txt").read_text())
    assert environments.prepare("vllm", model, "bf16") == model
    with pytest.raises(RunError, match="no int4 weights"):
        environments.prepare("vllm", model, "int4")


def test_a_failed_setup_step_says_why_and_where_its_log_is(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('fetching'); sys.exit('no network')"]
    with pytest.raises(RunError, match=r"failed: no network \(see .*openvino\.log\)"):
        Environments(tmp_path).step("openvino", command)
    assert "fetching" in (tmp_path / "openvino.log").read_text()


@pytest.mark.parametrize("name", PEERS)
def test_every_version_is_pinned(name: str) -> None:
    lines = (HERE / "locks" / f"{name}.txt").read_text().split()
    assert all("==" in line for line in lines)
    assert "torch==2.13.0" in lines
    assert not any(line.startswith("torchvision") for line in lines), "it breaks the CPU build of torch"
    assert version_of(name, Environments(Path())) or name == "llamacpp"


def test_table_has_medians_ranges_ratios_and_failures() -> None:
    results = [
        *(result("trunkline", "a", value) for value in (50.0, 40.0, 60.0)),
        *(result("vllm", "a", value) for value in (20.0, 30.0)),
        result("llamacpp", "a", 32.0),
        result("trunkline", "d", 5.0),
        result("vllm", "d", 10.0),
        result("llamacpp", "d", error="out of memory | really"),
        result("trunkline", "a8", error="not available"),
    ]
    rows = {row.split("|")[1].split()[0]: row for row in table(results).splitlines() if row.startswith("|")}
    header = ["", "workload", "unit", "trunkline 1.2", "llamacpp 1.2", "vllm 1.2", "Trunkline / best peer"]
    assert [cell.strip() for cell in rows["workload"].split("|")[:-1]] == header
    cells = {name: [cell.strip() for cell in row.split("|")[3:-1]] for name, row in rows.items()}
    assert cells["**a**"] == ["50.0 (40.0-60.0)", "32.0", "25.0 (20.0-30.0)", "1.56 x llamacpp"]
    assert cells["**d**"] == ["5.00", "failed: out of memory / really", "10.0", "0.50 x vllm"]
    assert cells["**a8**"] == ["failed: not available", "-", "-", "-"]
    assert table(results).endswith(
        "Measured 2026-03-04 on Some CPU, 2 cores, 2 threads. Medians and ranges of interleaved runs."
    )


def test_a_cell_of_some_failures_keeps_its_figures() -> None:
    results = [result("vllm", "c", 100.0), result("vllm", "c", error="took too long")]
    assert "| 100; 1 of 2 failed: took too long |" in table(results)


@pytest.mark.parametrize(
    "line", ["nonsense", "[]", '{"engine": "vllm"}', json.dumps(result("vllm", "z", 1.0))]
)
def test_a_line_that_is_no_result_is_named(line: str, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps(result("vllm", "a", 1.0)) + "\n" + line + "\n")
    assert len(read([file.read_text().splitlines()[0], ""])) == 1
    assert main(["table", str(file)]) == 2
    assert "line 2 is no result" in capsys.readouterr().err


def test_unknown_names_and_missing_models_are_refused(tmp_path: Path, capsys: Any) -> None:
    for words in (["--workloads", "a,z"], ["--engines", "abc"]):
        with pytest.raises(SystemExit):
            main(["run", "--model", str(tmp_path), *words])
        assert "choose from" in capsys.readouterr().err
    assert main(["run", "--model", str(tmp_path), "--env-dir", str(tmp_path)]) == 2
    assert "make-model" in capsys.readouterr().err


def test_run_prints_one_line_a_run_and_fails_when_nothing_ran(
    model: Path, tmp_path: Path, capsys: Any
) -> None:
    words = ["run", "--model", str(model), "--env-dir", str(tmp_path / "environments")]
    assert main([*words, "--workloads", "a,d", "--engines", "vllm", "--repeat", "2"]) == 1
    lines = read(capsys.readouterr().out.splitlines())
    assert [line["workload"] for line in lines] == ["a", "d", "a", "d"]


def test_small_things(model: Path) -> None:
    assert last_line("one\n\n two  \n\n") == "two"
    assert weights_bytes(model) == 100
    assert weights_bytes(model / "model.safetensors") == 100
    assert set(PEERS) == set(ENGINES) - {"trunkline"}
