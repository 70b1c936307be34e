"""One run of a shape on an engine: exact counts, and the time that it took."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import trunkline as sgl
from benchmarks.programs.shape import Shape
from trunkline.lang.backends.engine import EngineBackend


@dataclass
class Node:
    """A token of the tree of all prompts and outputs."""

    children: dict[int, Node] = field(default_factory=dict)
    asked: bool = False  # stands in a prompt
    made: bool = False  # its KV was computed while an output was generated


class Recorder(EngineBackend):
    """An engine's backend that notes each prompt and what was generated after it."""

    def __init__(self, engine: sgl.Engine) -> None:
        super().__init__(engine)
        self.root = Node()
        self.prompt_tokens = self.calls = 0

    async def call(self, fields: dict[str, Any]) -> Any:
        answer = await super().call({**fields, "return_prompt_token_ids": True})
        prefill = fields["sampling_params"]["max_new_tokens"] == 0 and not fields.get("return_logprob")
        for one in answer if isinstance(answer, list) else [answer]:
            if not prefill:  # what only fills the cache counts as cost, not as demand
                self._note(one["prompt_token_ids"], one["output_ids"])
        return answer

    def _note(self, prompt: list[int], output: list[int]) -> None:
        self.calls += 1
        self.prompt_tokens += len(prompt)
        node = self.root
        for token in prompt:
            node = node.children.setdefault(token, Node())
            node.asked = True
        for token in output[:-1]:
            node = node.children.setdefault(token, Node())
            node.made = True

    def fewest_prefills(self) -> int:
        """Prompt tokens that no order of the calls and no cache could avoid computing."""
        count, stack = 0, [self.root]
        while stack:
            node = stack.pop()
            count += node.asked and not node.made
            stack += node.children.values()
        return count


@dataclass(frozen=True)
class Measured:
    shape: str
    calls: int = 0
    prompt_tokens: int = 0
    prefill_tokens: int = 0
    fewest_prefills: int = 0
    steps: int = 0
    seconds: float = 0.0
    right: int = 0
    checked: int = 0

    @property
    def hit_rate(self) -> float:
        return 1 - self.prefill_tokens / max(self.prompt_tokens, 1)

    @property
    def best_hit_rate(self) -> float:
        return 1 - self.fewest_prefills / max(self.prompt_tokens, 1)

    def line(self) -> str:
        shown = f"{self.right}/{self.checked}" if self.checked else "-"
        share = self.hit_rate / max(self.best_hit_rate, 1e-9)
        return (
            f"{self.shape:<22} {self.calls:>5} calls {self.prompt_tokens:>7} in "
            f"{self.prefill_tokens:>7} prefilled  hits {self.hit_rate:.3f} of {self.best_hit_rate:.3f} = "
            f"{share:.3f} {self.steps:>6} steps {self.seconds:6.2f} s  right {shown}"
        )


def measure(shape: Shape, engine: sgl.Engine, rows: int | None = None) -> Measured:
    """Runs the shape once, from an empty cache."""
    engine.flush_cache()
    backend = Recorder(engine)
    sgl.set_default_backend(backend)
    before, started = counters(engine), time.perf_counter()
    try:
        right, checked = shape.run(rows or shape.rows)
    finally:
        sgl.set_default_backend(None)
    seconds, after = time.perf_counter() - started, counters(engine)
    spent = {name: after[name] - before[name] for name in ("prompt_tokens", "cached_tokens", "steps")}
    return Measured(
        shape.name,
        calls=backend.calls,
        prompt_tokens=backend.prompt_tokens,
        prefill_tokens=spent["prompt_tokens"] - spent["cached_tokens"],
        fewest_prefills=backend.fewest_prefills(),
        steps=spent["steps"],
        seconds=seconds,
        right=right,
        checked=checked,
    )


def counters(engine: sgl.Engine) -> dict[str, int]:
    found: dict[str, int] = engine.get_server_info()["internal_states"][0]
    return found
