"""Turns samples into token ids with loss weights, and groups them into batches with little padding."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .data import TASKS, Sample, generate, prompt_text

# share of tokens by task at the start; the accuracy of each task shifts it during training
SHARES = {
    "arithmetic": 10,
    "extract": 14,
    "tool_call": 20,
    "tool_result": 7,
    "classify": 17,
    "recall": 8,
    "needle": 12,
    "sort": 14,
    "spell": 9,
    "chat": 3,
    "scope": 3,
    "think": 12,
}
_LENGTH = {
    "arithmetic": 90,
    "extract": 85,
    "tool_call": 280,
    "tool_result": 245,
    "classify": 90,
    "recall": 125,
    "needle": 300,
    "sort": 120,
    "spell": 90,
    "chat": 50,
    "scope": 115,
    "think": 110,
}


@dataclass
class Encoded:
    """Token ids of a whole sample; ``start`` is where the target begins."""

    task: str
    ids: list[int]
    weights: list[float]
    start: int


class Encoder:
    """Encodes samples the way the engine will see them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.begin = tokenizer.token_to_id("<|im_start|>")
        self.end = tokenizer.token_to_id("<|im_end|>")
        self.role = tokenizer.encode("assistant", add_special_tokens=False).ids[0]

    def encode(self, sample: Sample, prompt_weight: float) -> Encoded:
        """Ids and weights: answers count most, of the other tokens every third a little.

        A target's weight grows with the root of its length, so that a one-token answer is not drowned.
        """
        text = prompt_text(sample)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        prompt = encoding.ids
        target = [*self.tokenizer.encode(sample.target, add_special_tokens=False).ids, self.end]
        weights = [0.0] * len(prompt)
        weights[len(prompt) % 3 :: 3] = [prompt_weight] * len(weights[len(prompt) % 3 :: 3])
        spans = [
            i for i, token in enumerate(prompt[:-1]) if token == self.begin and prompt[i + 1] == self.role
        ]
        for position in spans[:-1]:
            stop = prompt.index(self.end, position)
            weights[position + 2] = weights[position + 3] = 0.0  # here a thinking section could stand as well
            for index in range(position + 4, stop + 1):
                weights[index] = 3.0 / (stop - position - 2) ** 0.5
        if not sample.thinking:
            weights[-3:] = [0.0] * 3  # the empty thinking section, which only the template writes
        if sample.hints:
            base = text.rfind(sample.messages[-1]["content"])
            for index, (start, end) in enumerate(encoding.offsets):
                if any(base + low <= end - 1 and start < base + high for low, high in sample.hints):
                    weights[index] = 1.5
        weights += [3.0 / len(target) ** 0.5] * len(target)
        return Encoded(sample.task, prompt + target, weights, len(prompt))


def choose(rng: random.Random, accuracy: dict[str, float]) -> str:
    """A task by its share, raised for tasks that still fail."""
    weights = [
        SHARES[task] / _LENGTH[task] * (0.3 + 1.7 * min(1.0, (1 - accuracy.get(task, 0.0)) / 0.25))
        for task in TASKS
    ]
    return rng.choices(TASKS, weights)[0]


def copying(rng: random.Random, vocabulary: int) -> Encoded:
    """Random tokens that repeat: a pure exercise in copying.

    Most tasks need the same circuit: look back for what was just written and continue it. Exercises that hold
    little else bring it about far sooner.
    """
    period = rng.randint(4, rng.choice([8, 24]))
    unit = [rng.randrange(vocabulary) for _ in range(period)]
    ids = list(unit)
    weights = [0.0] * period
    while len(ids) < 64:
        start, count = rng.randrange(period - 2), rng.randint(3, period)
        piece = unit[start : start + count]
        ids += piece
        weights += [0.0] + [0.5] * (len(piece) - 1)
    return Encoded("copying", ids, weights, len(ids))


def draw_step(
    encoder: Encoder, step: int, accuracy: dict[str, float], scale: float, tokens: int, prompt_weight: float
) -> list[Encoded]:
    """The samples of one optimiser step, about ``tokens`` tokens."""
    rng = random.Random(f"step {step}")
    drawn: list[Encoded] = []
    total = 0
    while total < tokens:
        if accuracy.get("recall", 0.0) < 0.5 and rng.random() < 0.15:  # until copying works in the tasks
            drawn.append(copying(rng, encoder.tokenizer.get_vocab_size()))
            total += len(drawn[-1].ids)
            continue
        sample = generate(choose(rng, accuracy), rng.getrandbits(48), "train", scale)
        drawn.append(encoder.encode(sample, prompt_weight))
        total += len(drawn[-1].ids)
    return drawn


def group(samples: list[Encoded], tokens: int = 2600) -> list[list[Encoded]]:
    """Micro-batches of similar lengths, each at most ``tokens`` tokens with padding."""
    groups: list[list[Encoded]] = [[]]
    for sample in sorted(samples, key=lambda item: len(item.ids)):
        if groups[-1] and len(sample.ids) * (len(groups[-1]) + 1) > tokens:
            groups.append([])
        groups[-1].append(sample)
    return groups


def collate(samples: list[Encoded]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, targets, loss weights and the mask of target positions, right-padded."""
    width = max(len(sample.ids) for sample in samples) - 1
    ids = torch.zeros(len(samples), width, dtype=torch.long)
    targets = torch.zeros(len(samples), width, dtype=torch.long)
    weights = torch.zeros(len(samples), width)
    mask = torch.zeros(len(samples), width, dtype=torch.bool)
    for row, sample in enumerate(samples):
        count = len(sample.ids) - 1
        ids[row, :count] = torch.tensor(sample.ids[:-1])
        targets[row, :count] = torch.tensor(sample.ids[1:])
        weights[row, :count] = torch.tensor(sample.weights[1:])
        mask[row, sample.start - 1 : count] = True
    return ids, targets, weights, mask
