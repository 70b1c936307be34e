"""The engine on a CUDA device against the engine on the CPU. Fails where there is no such device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trunkline import Engine

pytestmark = pytest.mark.gpu

PROMPTS = ["the quick brown fox", "1 2 3 4 5 6 7 8 " * 20, "x"]
GREEDY = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}


def answers(model: Path, device: str, **flags: Any) -> list[dict[str, Any]]:
    limits = {"max_total_tokens": 4096, "context_length": 1024, "chunked_prefill_size": 64}
    with Engine(model_path=str(model), device=device, dtype="float32", **limits, **flags) as engine:
        found = [
            engine.generate(prompt, GREEDY, return_logprob=True, logprob_start_len=0) for prompt in PROMPTS
        ]
    return found


def logprobs(answer: dict[str, Any]) -> list[float]:
    meta = answer["meta_info"]
    return [entry[0] for entry in meta["input_token_logprobs"][1:] + meta["output_token_logprobs"]]


def test_same_tokens_as_on_the_cpu(tiny_model: Path) -> None:
    for gpu, cpu in zip(answers(tiny_model, "cuda"), answers(tiny_model, "cpu"), strict=True):
        assert gpu["output_ids"] == cpu["output_ids"]
        assert logprobs(gpu) == pytest.approx(logprobs(cpu), abs=1e-3)


def test_overlap_changes_nothing(tiny_model: Path) -> None:
    overlapped = answers(tiny_model, "cuda", overlap_depth=1)
    plain = answers(tiny_model, "cuda", overlap_depth=0)
    assert [answer["output_ids"] for answer in overlapped] == [answer["output_ids"] for answer in plain]
    assert [logprobs(answer) for answer in overlapped] == [logprobs(answer) for answer in plain]
