"""Interleaved runs, each in a fresh process, one result each."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.peers.environments import ENGINES, Environments, last_line, weights_bytes
from benchmarks.peers.workloads import WORKLOADS, Job, Outcome, RunError, Workload, figure_of
from trunkline.bench.report import random_prompts

Result = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Plan:
    workloads: list[str]
    engines: list[str]
    repeat: int
    model: Path
    seed: int = 0
    timeout: float = 300.0  # seconds a run may take

    def runs(self) -> Iterator[tuple[Workload, str]]:
        """Every round holds each workload, and within it each engine once: A B C, A B C."""
        for _ in range(self.repeat):
            for workload in self.workloads:
                for engine in self.engines:
                    yield WORKLOADS[workload], engine


def run_all(plan: Plan, environments: Environments) -> Iterator[Result]:
    """One result a run; one that failed has `error` in place of its figures."""
    for workload, engine in plan.runs():
        result: Result = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "threads": environments.threads,
            "engine": engine,
            "version": version_of(engine, environments),
            "workload": workload.name,
            "weights": workload.weights,
            "figure": workload.figure,
            "unit": workload.unit,
        }
        try:
            yield result | run_one(plan, environments, workload, engine)
        except RunError as error:
            yield result | {"error": str(error)}


def run_one(plan: Plan, environments: Environments, workload: Workload, engine: str) -> Result:
    """Convert if need be, run, check. Raises RunError."""
    model = environments.prepare(engine, plan.model, workload.weights)
    job = job_of(workload, plan, model, environments.threads)
    started_at = time.monotonic()
    outcome = run_program(engine, environments, job, plan.timeout)
    loaded = weights_bytes(model)
    figure = figure_of(job, outcome, started_at, loaded)
    return {
        "version": outcome.version,
        "value": round(figure, 3),
        "total_s": round(outcome.total_s, 4),
        "first_s": round(outcome.first_s, 4),
        "run_s": round(time.monotonic() - started_at, 1),
        "peak_rss_bytes": outcome.peak_rss_bytes,
        "weights_bytes": loaded,
        "kv_bytes": outcome.kv_bytes,
        "output_tokens": sum(outcome.tokens),
    }


def job_of(workload: Workload, plan: Plan, model: Path, threads: int) -> Job:
    config = json.loads((plan.model / "config.json").read_text())
    vocabulary, head = config["vocab_size"], config["head_dim"]
    kv_elements = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head
    warmup = random_prompts(1, workload.own, workload.shared, vocabulary, plan.seed + 1)[0]
    return Job(
        workload=workload.name,
        model=str(model),
        threads=threads,
        seed=plan.seed,
        prompts=random_prompts(workload.requests, workload.own, workload.shared, vocabulary, plan.seed),
        warmup=[] if workload.figure == "start" else warmup,
        kv_bytes_per_token=2 * kv_elements,
    )


def run_program(engine: str, environments: Environments, job: Job, timeout: float) -> Outcome:
    """Run the engine's program on a job; what it says to standard error stays in a log. Raises RunError."""
    command = [str(environments.python(engine)), "-m", f"benchmarks.peers.engines.{engine}"]
    log = environments.folder / f"{engine}-run.log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environments.variables(engine),
            cwd=environments.folder,
            start_new_session=True,
        ) as program,
    ):
        try:
            output, _ = program.communicate(json.dumps(asdict(job)), timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise RunError(f"took more than {timeout:g} s") from error
        finally:
            with suppress(ProcessLookupError):  # leave no server behind that the program started
                os.killpg(program.pid, signal.SIGKILL)
    if program.returncode != 0:
        raise RunError(reason(log.read_text(errors="replace"), program.returncode))
    return Outcome(**json.loads(output.splitlines()[-1]))


def reason(said: str, status: int) -> str:
    """Why a program failed, from what it wrote to standard error."""
    line = last_line(said)
    if refused := re.search(r"--quantization.*not supported.*", said):
        return f"not available: {refused.group()}"
    return f"ended with status {status}: {line}"


def version_of(engine: str, environments: Environments) -> str:
    """What its lock file pins; a run's outcome says what really ran."""
    lock = Path(__file__).resolve().parent / "locks" / f"{engine}.txt"
    if engine == "trunkline" or not lock.exists():
        return ""
    found = re.search(rf"^{ENGINES[engine].package}==(\S+)", lock.read_text(), re.MULTILINE)
    return found.group(1) if found else ""


def machine() -> str:
    """Processor and core count of this machine."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    name = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return f"{name.group(1) if name else platform.machine()}, {os.cpu_count()} cores"
