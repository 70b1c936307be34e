"""The workloads, what is read off a run of each, and the messages between the parent and an engine's program.

Standard library only: it is imported in every engine's environment.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Figure = Literal["decode", "prefill", "output", "total", "start", "memory"]

UNITS = MappingProxyType(
    {
        "decode": "output tokens/s",
        "prefill": "prompt tokens/s",
        "output": "output tokens/s",
        "total": "s",
        "start": "s",
        "memory": "MB",
    }
)
LOWER_IS_BETTER = frozenset({"total", "start", "memory"})


@dataclass(frozen=True)
class Workload:
    """`requests` prompts of `shared` common and `own` different tokens, `output_len` tokens out of each."""

    name: str
    figure: Figure
    requests: int
    own: int
    output_len: int
    shared: int = 0
    weights: str = "bf16"

    @property
    def unit(self) -> str:
        return UNITS[self.figure]

    @property
    def lower_is_better(self) -> bool:
        return self.figure in LOWER_IS_BETTER

    @property
    def about(self) -> str:
        prompt = f"{self.shared} shared + {self.own}" if self.shared else str(self.own)
        return f"{self.requests} x ({prompt} in, {self.output_len} out), {self.weights}: {self.figure}"


_ALL = (
    Workload("a", "decode", 1, 32, 128),
    Workload("b", "prefill", 1, 1024, 1),
    Workload("c", "output", 32, 128, 128),
    Workload("d", "total", 32, 32, 32, shared=1024),
    Workload("f", "start", 1, 32, 1),
    Workload("g", "memory", 32, 128, 16),
    Workload("a8", "decode", 1, 32, 128, weights="int8"),
    Workload("b8", "prefill", 1, 1024, 1, weights="int8"),
    Workload("c8", "output", 32, 128, 128, weights="int8"),
    Workload("a4", "decode", 1, 32, 128, weights="int4"),
)
WORKLOADS = MappingProxyType({workload.name: workload for workload in _ALL})


@dataclass(frozen=True, kw_only=True)
class Job:
    """What an engine's program reads from its standard input, as JSON."""

    workload: str
    model: str  # in the form that the engine loads
    threads: int
    seed: int
    prompts: list[list[int]]
    warmup: list[int]  # a prompt that is run before the clock starts; empty: none
    kv_bytes_per_token: int  # at 2 bytes an element

    @property
    def output_len(self) -> int:
        return WORKLOADS[self.workload].output_len

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output together."""
        return max(map(len, self.prompts)) + self.output_len


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an engine's program prints as the last line of its output. Times in seconds."""

    version: str
    tokens: list[int]  # generated, of each request
    first_s: float  # all submitted to the last first token
    total_s: float  # all submitted to the last token
    kv_bytes: int
    first_token_at: float  # time.monotonic() of the first token of all, the warm-up's included
    started_at: float | None = None  # of the engine's process, where it is not the program itself
    peak_rss_bytes: int = 0  # of the largest process; 0: `answer` asks the operating system


class RunError(Exception):
    """This run gave no figure; the message says why, on one line."""


def figure_of(job: Job, outcome: Outcome, started_at: float, weights_bytes: int) -> float:
    """The workload's figure, in its unit. Raises RunError when the tokens are not those asked for."""
    workload = WORKLOADS[job.workload]
    if outcome.tokens != [workload.output_len] * workload.requests:
        raise RunError(
            f"generated {sum(outcome.tokens)} tokens for {len(outcome.tokens)} requests instead of "
            f"{workload.requests} x {workload.output_len}"
        )
    match workload.figure:
        case "decode":
            return (sum(outcome.tokens) - workload.requests) / (outcome.total_s - outcome.first_s)
        case "prefill":
            return sum(map(len, job.prompts)) / outcome.first_s
        case "output":
            return sum(outcome.tokens) / outcome.total_s
        case "total":
            return outcome.total_s
        case "start":
            return outcome.first_token_at - (outcome.started_at or started_at)
        case "memory":
            return (outcome.peak_rss_bytes - weights_bytes - outcome.kv_bytes) / 1e6
