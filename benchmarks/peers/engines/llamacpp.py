"""llama.cpp's server, fed token ids over HTTP: the front of it that batches requests.

All slots share one KV buffer. The first token's time is total minus what the server says decoding took.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.peers.engines.http import Server, serve
from benchmarks.peers.engines.program import answer
from benchmarks.peers.workloads import Job, Outcome

VERSION = "0.3.36"  # of llama-cpp-python, whose sources were built


def run(job: Job) -> Outcome:
    requests = len(job.prompts)
    kv_tokens = requests * (job.longest + 64)
    program = Path(sys.prefix) / "build" / "bin" / "llama-server"
    words = f"--parallel {requests} --ctx-size {kv_tokens} --kv-unified --offline --no-ui --cache-ram 0"
    words += f" --threads {job.threads} --threads-batch {job.threads} --log-verbosity 1"
    with serve([str(program), "--model", job.model, *words.split()]) as server:
        first = server.first_post("/completion", body(job.warmup or job.prompts[0], 4 if job.warmup else 1))
        first_token_at = time.monotonic()
        if job.warmup:
            answers, total_s, first_s = generate(server, job)
        else:
            answers, first_s, total_s = [first], first_token_at - server.started_at, 0.0
        return Outcome(
            version=VERSION,
            tokens=[int(found["tokens_predicted"]) for found in answers],
            first_s=first_s,
            total_s=total_s or first_s,
            kv_bytes=kv_tokens * job.kv_bytes_per_token,
            first_token_at=first_token_at,
            started_at=server.started_at,
        )


def generate(server: Server, job: Job) -> tuple[list[dict[str, Any]], float, float]:
    """Answers, seconds until the last token, and until the last first token."""
    firsts: list[float] = []
    start = time.monotonic()

    def one(prompt: list[int]) -> dict[str, Any]:
        found = server.post("/completion", body(prompt, job.output_len))
        firsts.append(time.monotonic() - start - float(found["timings"]["predicted_ms"]) / 1000)
        return found

    with ThreadPoolExecutor(len(job.prompts)) as pool:
        answers = list(pool.map(one, job.prompts))
    return answers, time.monotonic() - start, max(firsts)


def body(prompt: list[int], output_len: int) -> dict[str, object]:
    return {"prompt": prompt, "n_predict": output_len, "temperature": 0.0, "ignore_eos": True}


if __name__ == "__main__":
    answer(run)
