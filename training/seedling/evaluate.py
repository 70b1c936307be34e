"""Exact accuracy by task over unseen seeds, through the Trunkline engine or through plain torch.

``python -m training.seedling.evaluate`` exits with status 1 if a task falls below the required accuracy.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from .data import TASKS, Sample, check, generate, prompt_text
from .model import Seedling, SeedlingConfig
from .train import ASSETS

REQUIRED = 0.95
AGREEMENT = 0.99  # required of the likeliest tokens with rounded keys and values
SEED = 50_000_000  # far from the seeds that training looks at
LONGEST = 110  # no expected answer has more tokens
Generate = Callable[[list[str]], list[str]]


def torch_backend(folder: Path) -> Generate:
    """Greedy decoding with the training model on the exported weights."""
    facts = json.loads((folder / "config.json").read_text())
    config = SeedlingConfig(**{name: facts[name] for name in SeedlingConfig().to_dict()})
    model = Seedling(config).eval()
    weights = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(weights)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    eos = {tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")}

    def answer(prompts: list[str]) -> list[str]:
        ids = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
        texts = [""] * len(prompts)
        by_length = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        for start in range(0, len(ids), 16):
            rows = by_length[start : start + 16]
            for row, output in zip(
                rows, model.generate([ids[row] for row in rows], LONGEST, eos), strict=True
            ):
                texts[row] = tokenizer.decode(output, skip_special_tokens=True)
        return texts

    return answer


def engine_backend(folder: Path, quantization: str | None, kv_cache_dtype: str = "auto") -> Generate:
    """Greedy decoding with the serving engine."""
    from trunkline import Engine

    def answer(prompts: list[str]) -> list[str]:
        with Engine(
            model_path=str(folder), quantization=quantization, kv_cache_dtype=kv_cache_dtype
        ) as engine:
            outputs = engine.generate(
                prompt=prompts, sampling_params={"temperature": 0, "max_new_tokens": LONGEST}
            )
        return [output["text"] for output in outputs]

    return answer


def agreement(folder: Path, kv_cache_dtype: str, tasks: list[str], count: int) -> float:
    """Share of positions of prompts and right answers at which the engine's likeliest token is the same with
    this type of keys and values as with --dtype's."""
    from trunkline import Engine

    samples = [generate(task, SEED + index, "eval") for task in tasks for index in range(count)]
    texts = [prompt_text(sample) + sample.target for sample in samples]
    found = []
    for kind in ("auto", kv_cache_dtype):
        with Engine(model_path=str(folder), kv_cache_dtype=kind) as engine:
            outputs = engine.generate(
                prompt=texts,
                sampling_params={"temperature": 0, "max_new_tokens": 1},
                return_logprob=True,
                logprob_start_len=0,
                top_logprobs_num=1,
            )
        tops = [output["meta_info"]["input_top_logprobs"] for output in outputs]
        found.append([top[0][1] for row in tops for top in row if top])
    return sum(a == b for a, b in zip(*found, strict=True)) / len(found[0])


def evaluate(
    backend: Generate, tasks: list[str], count: int, failures: list[tuple[Sample, str]]
) -> dict[str, float]:
    """Accuracy by task; wrong answers are appended to ``failures``."""
    samples = [generate(task, SEED + index, "eval") for task in tasks for index in range(count)]
    outputs = backend([prompt_text(sample) for sample in samples])
    missed = dict.fromkeys(tasks, 0)
    for index, (sample, output) in enumerate(zip(samples, outputs, strict=True)):
        if not check(sample, output):
            missed[tasks[index // count]] += 1
            failures.append((sample, output))
    return {task: 1 - missed[task] / count for task in tasks}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ASSETS)
    parser.add_argument("--backend", choices=["engine", "torch"], default="engine")
    parser.add_argument("--quantization", choices=["int8", "int4"], help="of the engine backend")
    parser.add_argument("--kv-cache-dtype", default="auto", help="of the engine backend")
    parser.add_argument("--agreement", action="store_true", help="of --kv-cache-dtype with --dtype's instead")
    parser.add_argument("--count", type=int, default=100, help="unseen samples of each task")
    parser.add_argument("--tasks", nargs="*", default=TASKS, choices=TASKS)
    parser.add_argument("--show", type=int, default=0, help="print this many wrong answers of each task")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.agreement:
        share = agreement(args.model, args.kv_cache_dtype, args.tasks, args.count)
        print(f"the likeliest token is the same at {share:.2%} of all positions")
        return int(share < AGREEMENT)
    if args.backend == "torch":
        backend = torch_backend(args.model)
    else:
        backend = engine_backend(args.model, args.quantization, args.kv_cache_dtype)
    failures: list[tuple[Sample, str]] = []
    began = time.monotonic()
    result = evaluate(backend, args.tasks, args.count, failures)
    for task, accuracy in result.items():
        print(f"{task:12} {accuracy:7.1%} {'' if accuracy >= REQUIRED else f'  below {REQUIRED:.0%}'}")
    print(f"{args.count} unseen samples a task, {args.backend} backend, {time.monotonic() - began:.0f} s")
    shown: dict[str, int] = {}
    for sample, output in failures:
        shown[sample.task] = shown.get(sample.task, 0) + 1
        if shown[sample.task] <= args.show:
            print(f"--- {sample.task}: {prompt_text(sample)[-300:]!r}")
            print(f" wanted {sample.target!r}\n got    {output!r}")
    return int(min(result.values()) < REQUIRED)


if __name__ == "__main__":
    sys.exit(main())
