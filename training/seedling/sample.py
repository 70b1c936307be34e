"""The sample type, its exact checker, and helpers to vary how a request is put."""

from __future__ import annotations

import json
import random
import re
import zlib
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]

THINK = re.compile(r"^\s*<think>.*?</think>\s*", re.DOTALL)
TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


@dataclass
class Sample:
    """One prompt with the only answer that counts as right.

    ``kind`` selects the comparison: ``text`` (same characters), ``json`` (same object), ``tool`` (same call).
    ``thought`` is the target of the thinking section; it is trained on but not checked.
    """

    task: str
    messages: list[Message]
    answer: str
    kind: str = "text"
    tools: list[dict[str, Any]] | None = None
    thinking: bool = False
    thought: str = ""
    hints: list[tuple[int, int]] = field(default_factory=list)  # parts of the last message worth training on

    @property
    def target(self) -> str:
        """The whole assistant text, thinking section included."""
        return f"<think>\n{self.thought}\n</think>\n\n{self.answer}" if self.thinking else self.answer


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def check(sample: Sample, output: str) -> bool:
    """Whether ``output`` (special tokens removed) is the expected answer, exactly."""
    if sample.thinking:
        if not THINK.match(output):
            return False
        output = THINK.sub("", output)
    output = output.removesuffix("<|im_end|>").strip()
    if sample.kind == "json":
        return _parse(output) == json.loads(sample.answer)
    if sample.kind == "tool":
        calls = [_parse(call) for call in TOOL_CALL.findall(output)]
        wanted = [json.loads(call) for call in TOOL_CALL.findall(sample.answer)]
        return calls == wanted and not TOOL_CALL.sub("", output).strip()
    return output == sample.answer


def bucket(text: str, count: int) -> int:
    """A stable number below ``count`` for a text; it separates training from evaluation."""
    return zlib.crc32(text.encode()) % count


ORDER_PREFIX = ["Please ", "Please ", "Can you ", "Could you ", "I need you to ", "Hey, ", "Now "]
QUESTION_PREFIX = ["Tell me, ", "Hey, ", "Hi! ", "Quick question: ", "Please tell me: ", "So, ", "I wonder: "]


def _lower(text: str) -> str:
    return text[0].lower() + text[1:] if text[0].isupper() and not text.startswith(("I ", "I'")) else text


def order(rng: random.Random, text: str) -> str:
    """An instruction as somebody might type it; ``text`` has no final full stop."""
    roll = rng.random()
    if roll < 0.4:
        text = text + rng.choice([".", "", ""])
    elif roll < 0.8:
        prefix = rng.choice(ORDER_PREFIX)
        text = (
            prefix
            + _lower(text)
            + (rng.choice(["?", "?", ""]) if prefix.startswith("C") else rng.choice([".", ""]))
        )
    else:
        text = text + rng.choice([", please.", " please", ", please"])
    return _lower(text) if rng.random() < 0.25 else text


def question(rng: random.Random, text: str) -> str:
    """A question as somebody might type it; ``text`` has no question mark."""
    if rng.random() < 0.2:
        text = rng.choice(QUESTION_PREFIX) + _lower(text)
    text = _lower(text) if rng.random() < 0.3 else text
    return text + ("?" if rng.random() < 0.8 else "")


def user(text: str) -> Message:
    """A user message."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """An assistant message."""
    return {"role": "assistant", "content": text}


def listed(parts: list[str]) -> str:
    """``a, b and c``."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
