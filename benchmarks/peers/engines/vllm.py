"""vLLM's engine in this process, stepped by hand: no HTTP, no second process.

Prefix caching and chunked prefill are on, as by default; the model is compiled: eager decodes slower.
"""

from __future__ import annotations

import time

import vllm
from vllm import LLM, SamplingParams

from benchmarks.peers.engines.program import Timeline, answer
from benchmarks.peers.workloads import Job, Outcome

CONTEXT = 2048  # one length for all workloads, so that they share the compiled model


def run(job: Job) -> Outcome:
    kv_tokens = max(CONTEXT + 128, len(job.prompts) * (job.longest + 128))
    llm = LLM(
        job.model,
        dtype="bfloat16",
        max_model_len=CONTEXT,
        max_num_seqs=32,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=kv_tokens * job.kv_bytes_per_token,
    )
    first_token_at = None
    if job.warmup:
        generate(llm, "warm-up", [job.warmup], 4)
        first_token_at = time.monotonic()
    timeline = generate(llm, "run", job.prompts, job.output_len)
    return timeline.outcome(vllm.__version__, kv_tokens * job.kv_bytes_per_token, first_token_at)


def generate(llm: LLM, name: str, prompts: list[list[int]], output_len: int) -> Timeline:
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False)
    timeline = Timeline(len(prompts))
    for index, prompt in enumerate(prompts):
        llm.llm_engine.add_request(f"{name}-{index}", {"prompt_token_ids": prompt}, params)
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            index = int(output.request_id.split("-")[-1])
            timeline.note(index, len(output.outputs[0].token_ids) - timeline.tokens[index])
    return timeline


if __name__ == "__main__":
    answer(run)
