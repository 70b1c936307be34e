"""OpenVINO GenAI's continuous-batching pipeline in this process.

Its defaults are kept: bf16 arithmetic, KV cache in 8 bits, activations of quantised layers in 8 bits. Prefix
caching is on only where prompts share a prefix.
"""

from __future__ import annotations

import time

import numpy as np
import openvino
import openvino_genai as genai

from benchmarks.peers.engines.program import Timeline, answer
from benchmarks.peers.workloads import WORKLOADS, Job, Outcome

BLOCK = 32  # tokens of a KV block on CPU


def run(job: Job) -> Outcome:
    blocks = len(job.prompts) * (job.longest // BLOCK + 2)
    scheduler = genai.SchedulerConfig()
    scheduler.num_kv_blocks = blocks
    scheduler.max_num_seqs = 32
    scheduler.max_num_batched_tokens = 2048
    scheduler.enable_prefix_caching = WORKLOADS[job.workload].shared > 0
    pipeline = genai.ContinuousBatchingPipeline(
        job.model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": job.threads}
    )
    first_token_at = None
    if job.warmup:
        generate(pipeline, [job.warmup], 4, first_id=0)
        first_token_at = time.monotonic()
    timeline = generate(pipeline, job.prompts, job.output_len, first_id=1)
    kv_bytes = blocks * BLOCK * job.kv_bytes_per_token // 2
    return timeline.outcome(genai.__version__.split("-")[0], kv_bytes, first_token_at)


def generate(
    pipeline: genai.ContinuousBatchingPipeline, prompts: list[list[int]], output_len: int, first_id: int
) -> Timeline:
    config = genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = output_len
    config.ignore_eos = True
    config.do_sample = False
    tensors = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
    timeline = Timeline(len(prompts))
    handles = [pipeline.add_request(first_id + i, tensor, config) for i, tensor in enumerate(tensors)]
    while pipeline.has_non_finished_requests():
        pipeline.step()
        for index, handle in enumerate(handles):
            while handle.can_read():
                for output in handle.read().values():
                    timeline.note(index, len(output.generated_ids))
    return timeline


if __name__ == "__main__":
    answer(run)
