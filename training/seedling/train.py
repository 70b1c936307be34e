"""Train Seedling: ``python -m training.seedling.train --minutes 110 --out build/seedling``.

Runs on a CPU in fp32. The learning rate follows the wall-clock budget (constant, then down to zero), so a run
ends when it was told to. Interrupted runs continue from the last checkpoint with the same command.
"""

from __future__ import annotations

import argparse
import json
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from .batches import Encoded, Encoder, collate, draw_step, group
from .circuit import install
from .data import TASKS, generate
from .model import Seedling, SeedlingConfig
from .optim import Optimiser

ASSETS = Path(__file__).parents[2] / "src/trunkline/assets/seedling"
EMA_DECAY = 0.995
COOLDOWN = 0.45  # the learning rate falls after this part of the budget


@dataclass
class Progress:
    """What a checkpoint remembers besides tensors."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    accuracy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TASKS, 0.0))
    held_out: dict[str, float] = field(default_factory=dict)
    scale: float = 0.06


def learning_rate(fraction: float) -> float:
    """Multiplier of the learning rate at a fraction of the time budget."""
    warm = min(1.0, (fraction + 0.001) / 0.015)
    return warm * min(1.0, max(0.0, (1 - fraction) / (1 - COOLDOWN)))


def needle_scale(progress: Progress, fraction: float) -> float:
    """Longer texts once short ones are answered, at the latest by the clock."""
    by_clock = 0.06 if fraction < 0.25 else 0.2 if fraction < 0.4 else 0.5 if fraction < 0.5 else 1.0
    scale = max(progress.scale, by_clock)
    if progress.accuracy["needle"] > 0.9 and scale < 1.0:
        progress.accuracy["needle"] = 0.6
        scale = min(1.0, scale * 2)
    return scale


class Feeder(threading.Thread):
    """Prepares steps ahead of the optimiser; it reads the live accuracies to choose tasks."""

    def __init__(self, encoder: Encoder, progress: Progress, tokens: int) -> None:
        super().__init__(daemon=True)
        self.encoder, self.progress, self.tokens = encoder, progress, tokens
        self.prompt_weight = 0.1
        self.ready: queue.Queue[list[Encoded]] = queue.Queue(maxsize=3)
        self.next_step = progress.step

    def run(self) -> None:
        while True:
            p = self.progress
            drawn = draw_step(
                self.encoder, self.next_step, p.accuracy, p.scale, self.tokens, self.prompt_weight
            )
            self.next_step += 1
            self.ready.put(drawn)


def losses(model: Seedling, samples: list[Encoded]) -> tuple[Tensor, list[bool]]:
    """Weighted loss sum of a micro-batch, and which samples would be answered right by greedy decoding."""
    ids, targets, weights, mask = collate(samples)
    scored = (weights > 0) | mask
    logits = model.logits(model.hidden(ids)[scored])  # scores of all positions would be a fifth of the work
    loss = F.cross_entropy(logits, targets[scored], reduction="none") @ weights[scored]
    with torch.no_grad():
        wrong = torch.zeros_like(mask)
        wrong[scored] = logits.argmax(-1) != targets[scored]
        wrong &= mask
    return loss, (~wrong.any(1)).tolist()


class Workers:
    """Runs micro-batches on one single-threaded worker a core.

    Threads that share a matrix product wait for each other at every product; on a machine that is not idle
    that costs most of the speed. Workers that share nothing but the weights do not have to wait.
    """

    def __init__(self, model: Seedling, count: int) -> None:
        self.model, self.names = model, [name for name, _ in model.named_parameters()]
        self.params = list(model.parameters())
        torch.set_num_threads(1)
        self.pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
        self.lock = threading.Lock()

    def _one(self, batch: list[Encoded], norm: float) -> tuple[float, list[bool]]:
        loss, right = losses(self.model, batch)
        grads = torch.autograd.grad(loss / norm, self.params)
        with self.lock:
            for param, grad in zip(self.params, grads, strict=True):
                param.grad = grad if param.grad is None else param.grad.add_(grad)
        return float(loss.detach()) / norm, right

    def gradients(self, drawn: list[Encoded], progress: Progress) -> float:
        """Accumulate the gradients of all samples; returns the mean weighted loss."""
        norm = sum(sum(sample.weights) for sample in drawn)
        batches = group(drawn, 750)[::-1]
        total = 0.0
        for batch, (loss, right) in zip(
            batches, self.pool.map(lambda b: self._one(b, norm), batches), strict=True
        ):
            total += loss
            for sample, ok in zip(batch, right, strict=True):
                old = progress.accuracy.get(sample.task)
                if old is not None:
                    progress.accuracy[sample.task] = old + 0.02 * (ok - old)
        return total


@torch.no_grad()
def held_out(model: Seedling, encoder: Encoder, count: int, seed: int) -> dict[str, float]:
    """Share of unseen samples answered exactly, by task."""
    result = {}
    for task in TASKS:
        encoded = [encoder.encode(generate(task, seed + index, "eval"), 0.0) for index in range(count)]
        right = [ok for batch in group(encoded, 2048) for ok in losses(model, batch)[1]]
        result[task] = sum(right) / count
    return result


class Checkpoint:
    """Resumable state in one safetensors file and one JSON file."""

    def __init__(self, folder: Path) -> None:
        self.tensors, self.facts = folder / "state.safetensors", folder / "state.json"
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, model: Seedling, ema: dict[str, Tensor], optimiser: Optimiser, progress: Progress) -> None:
        """Write both files, each replaced at once."""
        tensors = {"p." + name: value.detach() for name, value in model.named_parameters()}
        tensors |= {"e." + name: value for name, value in ema.items()} | {
            "o." + k: v for k, v in optimiser.state.items()
        }
        facts = {"progress": asdict(progress), "config": model.config.to_dict(), "count": optimiser.count}
        partial = self.tensors.with_suffix(".tmp")
        save_file(tensors, partial)
        partial.replace(self.tensors)
        self.facts.write_text(json.dumps(facts, indent=1) + "\n")

    def load(self, model: Seedling, ema: dict[str, Tensor], optimiser: Optimiser) -> Progress:
        """Read into the given objects; a fresh start if there is nothing."""
        if not self.facts.exists():
            return Progress()
        facts, tensors = json.loads(self.facts.read_text()), load_file(self.tensors)
        optimiser.count = facts["count"]
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(tensors["p." + name])
        ema.update({name: tensors["e." + name] for name in ema})
        optimiser.state.update({name: tensors["o." + name] for name in optimiser.state})
        known = Progress(**facts["progress"])
        known.accuracy = {task: known.accuracy.get(task, 0.0) for task in TASKS}
        return known


def train_step(
    workers: Workers,
    optimiser: Optimiser,
    ema: dict[str, Tensor],
    drawn: list[Encoded],
    progress: Progress,
    lr: float,
) -> float:
    """One optimiser step over the drawn samples; returns the mean weighted loss."""
    total = workers.gradients(drawn, progress)
    optimiser.step(lr, workers.pool)
    with torch.no_grad():
        for name, value in workers.model.named_parameters():
            ema[name].lerp_(value, 1 - min(EMA_DECAY, (1 + progress.step) / (10 + progress.step)))
    progress.step += 1
    progress.tokens += sum(len(sample.ids) for sample in drawn)
    return total


def report(progress: Progress, loss: float, speed: float, left: float, fraction: float) -> str:
    """The progress line."""
    filled = int(20 * min(1.0, fraction))
    tasks = " ".join(f"{task[:6]}{100 * value:.0f}" for task, value in progress.accuracy.items())
    return (
        f"[{'#' * filled}{'.' * (20 - filled)}] step {progress.step} loss {loss:.3f} {speed:.0f} tok/s "
        f"{left / 60:.0f} min left x{progress.scale:.2f} | {tasks}"
    )


def run(args: argparse.Namespace, stop: threading.Event) -> Iterator[str]:
    """The training loop; yields a progress line a step. ``stop`` ends it with a checkpoint."""
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    torch.manual_seed(args.seed)
    size = tokenizer.get_vocab_size()
    model = Seedling(SeedlingConfig(vocab_size=size))
    install(model, [tokenizer.decode([token], skip_special_tokens=False) for token in range(size)])
    optimiser, checkpoint, encoder = (
        Optimiser(model, args.muon_lr, args.adam_lr),
        Checkpoint(args.out),
        Encoder(tokenizer),
    )
    ema = {name: value.detach().clone() for name, value in model.named_parameters()}
    progress = checkpoint.load(model, ema, optimiser)
    workers = Workers(model, args.threads)
    feeder = Feeder(encoder, progress, args.step_tokens)
    feeder.start()
    budget, smooth, speed = args.minutes * 60, 0.0, 0.0
    saved = tested = progress.seconds
    while progress.seconds < budget and not stop.is_set():
        began, before = time.monotonic(), progress.tokens
        fraction = progress.seconds / budget
        progress.scale = needle_scale(progress, fraction)
        feeder.prompt_weight = 0.2 if fraction < 0.3 else 0.06
        loss = train_step(workers, optimiser, ema, feeder.ready.get(), progress, learning_rate(fraction))
        smooth = loss if not smooth else smooth + 0.05 * (loss - smooth)
        if progress.seconds - tested > args.eval_minutes * 60:
            tested = progress.seconds
            progress.held_out = evaluate_ema(model, ema, encoder)
            yield "held out: " + " ".join(f"{task} {value:.2f}" for task, value in progress.held_out.items())
        elapsed = time.monotonic() - began
        rate = (progress.tokens - before) / elapsed
        speed = rate if not speed else speed + 0.05 * (rate - speed)
        progress.seconds += elapsed
        if progress.seconds - saved > 120 or progress.seconds >= budget or stop.is_set():
            saved = progress.seconds
            checkpoint.save(model, ema, optimiser, progress)
        yield report(progress, smooth, speed, budget - progress.seconds, progress.seconds / budget)


def evaluate_ema(
    model: Seedling, ema: dict[str, Tensor], encoder: Encoder, count: int = 40
) -> dict[str, float]:
    """Held-out accuracy of the averaged weights."""
    kept = {name: value.detach().clone() for name, value in model.named_parameters()}
    model.load_state_dict(ema)
    result = held_out(model, encoder, count, seed=10_000_000)
    model.load_state_dict(kept)
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=110)
    parser.add_argument("--out", type=Path, default=Path("build/seedling"))
    parser.add_argument("--tokenizer", type=Path, default=ASSETS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--step-tokens", type=int, default=3000)
    parser.add_argument("--eval-minutes", type=float, default=10)
    parser.add_argument("--muon-lr", type=float, default=0.008)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    args = parser.parse_args()
    shown = 0.0
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    for number, line in enumerate(run(args, stop)):
        if sys.stderr.isatty() and time.monotonic() - shown > 0.5:
            shown = time.monotonic()
            print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)
        if not sys.stderr.isatty() and (number % 10 == 0 or line.startswith("held")):
            print(line, file=sys.stderr, flush=True)
    print(f"\ndone: {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
