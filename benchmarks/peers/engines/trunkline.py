"""Trunkline through its own `trunkline bench offline`; the start through `trunkline serve`.

The warm-up is the command's own, of 8 tokens, where the peers get a prompt of the workload's length.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.metadata import version

from benchmarks.peers.engines.http import serve
from benchmarks.peers.engines.program import answer
from benchmarks.peers.workloads import WORKLOADS, Job, Outcome, Workload

COMMAND = (sys.executable, "-c", "import sys; from trunkline.cli.main import main; sys.exit(main())")


def run(job: Job) -> Outcome:
    return offline(job) if job.warmup else first_token(job)


def bench_words(job: Job, workload: Workload) -> list[str]:
    """The command line after `trunkline`."""
    words = f"bench offline --json --num-prompts {workload.requests} --input-len {workload.own}"
    words += f" --output-len {workload.output_len} --shared-prefix-len {workload.shared} --seed {job.seed}"
    words += f" --cpu-threads {job.threads}"
    if workload.weights != "bf16":
        words += f" --quantization {workload.weights}"
    return [*words.split(), "--model-path", job.model]


def offline(job: Job) -> Outcome:
    workload = WORKLOADS[job.workload]
    output = subprocess.run(
        [*COMMAND, *bench_words(job, workload)], stdout=subprocess.PIPE, text=True, check=False
    )
    if output.returncode != 0:
        sys.exit(output.returncode)  # the command has said why, on standard error
    found = json.loads(output.stdout.splitlines()[-1])
    each, rest = divmod(found["output_tokens"], workload.requests)
    cache = found["config"]["cache"]
    return Outcome(
        version=found["version"],
        tokens=[each + (index < rest) for index in range(workload.requests)],
        first_s=found["ttft_p99_ms"] / 1000,
        total_s=found["total_s"],
        kv_bytes=cache["num_pages"] * cache["page_size"] * job.kv_bytes_per_token,
        first_token_at=0.0,
        peak_rss_bytes=found["peak_rss_bytes"],
    )


def first_token(job: Job) -> Outcome:
    words = ["serve", "--model-path", job.model, "--cpu-threads", str(job.threads)]
    params = {"max_new_tokens": job.output_len, "temperature": 0.0, "ignore_eos": True}
    with serve([*COMMAND, *words]) as server:
        found = server.first_post("/generate", {"input_ids": job.prompts[0], "sampling_params": params})
        at = time.monotonic()
    return Outcome(
        version=version("trunkline"),
        tokens=[found["meta_info"]["completion_tokens"]],
        first_s=at - server.started_at,
        total_s=at - server.started_at,
        kv_bytes=0,
        first_token_at=at,
        started_at=server.started_at,
    )


if __name__ == "__main__":
    answer(run)
