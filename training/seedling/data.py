"""Seeded generator of Seedling's exercises and their exact checker.

``generate(task, seed, split)`` is a pure function. The two splits never share a prompt: the text of the last
request decides which one a sample belongs to.
"""

from __future__ import annotations

import json
import random
from typing import Any

from . import words
from .sample import Message, Sample, bucket, check
from .tasks_basic import basic
from .tasks_text import classify, extract, needle, recall
from .tasks_tools import tool_call, tool_result
from .template import render

TASKS = [
    "arithmetic",
    "extract",
    "tool_call",
    "tool_result",
    "classify",
    "recall",
    "needle",
    "sort",
    "spell",
    "chat",
    "scope",
    "think",
]
_SYSTEM = [
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are Seedling, a small language model.",
    "You are a friendly assistant named Seedling.",
    "Answer briefly.",
    "Be concise and exact.",
    "You are a test model.",
    "You are a precise assistant. Answer with the result only.",
    "Help the user.",
    "You are an assistant for {n}.",
    "Today is {d}.",
    "The user is called {n}. Be polite.",
    "You are a careful assistant in a {w} shop.",
    "You are a helpful AI assistant. Keep your answers short.",
]
_HELD_OUT = 20  # one prompt in this many belongs to the evaluation split


def _build(task: str, rng: random.Random, split: str, scale: float) -> Sample:
    if task == "think":
        roll = rng.random()
        if roll < 0.7:
            sample = basic("arithmetic" if roll < 0.4 else "sort", rng, split)
        else:
            others = [name for name in TASKS if name not in ("arithmetic", "sort", "classify", "think")]
            sample = _build(rng.choice(others), rng, split, min(scale, 0.15))
        sample.task, sample.thinking = "think", True
        return sample
    if task == "needle":
        return needle(rng, split, scale)
    makers = {
        "extract": extract,
        "classify": classify,
        "recall": recall,
        "tool_call": tool_call,
        "tool_result": tool_result,
    }
    return makers[task](rng, split) if task in makers else basic(task, rng, split)


def generate(task: str, seed: int, split: str = "eval", scale: float = 1.0) -> Sample:
    """The sample of a task for a seed; ``scale`` shortens the texts of ``needle``."""
    rng = random.Random(f"{split}/{task}/{seed}")
    while True:
        sample = _build(task, rng, split, scale)
        key = json.dumps([sample.messages[-1].get("content"), sample.tools, len(sample.messages)])
        if (bucket(key, _HELD_OUT) == 0) == (split != "train"):
            break
    if rng.random() < 0.35:
        text = rng.choice(_SYSTEM).format(n=words.person(rng), d=rng.choice(words.DAYS), w=words.word(rng))
        sample.messages.insert(0, {"role": "system", "content": text})
    return sample


def prompt_text(sample: Sample) -> str:
    """The prompt up to where the model starts to write."""
    return render(sample.messages, sample.tools, enable_thinking=sample.thinking)


__all__ = ["TASKS", "Message", "Sample", "check", "generate", "prompt_text"]


def describe(sample: Sample) -> dict[str, Any]:
    """A JSON-able view of a sample, to look at data."""
    return {"task": sample.task, "prompt": prompt_text(sample), "target": sample.target}
