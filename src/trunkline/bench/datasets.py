"""What a load test sends: sessions of one or more turns, each due at its own time, generated or from a file.

Token ids are drawn below a bound that every vocabulary has. A dialect that only takes text gets the same
draw as words, so that sessions share exactly the prefixes that they would share as ids.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from trunkline.types import RequestError

BLOCK = 512  # tokens that one of `hash_ids` stands for, in traces as Mooncake publishes them

Content = list[int] | str


class Turn(msgspec.Struct, frozen=True):
    """What a session adds to what was said so far, and how many tokens are asked for. `pause`: seconds after
    the answer before, as a reader or a tool takes them."""

    content: Content
    output_len: int
    pause: float = 0.0


class Session(msgspec.Struct, frozen=True):
    """Turns that build on each other. `due`: seconds from the start of the run. `system` opens a chat."""

    due: float
    turns: list[Turn]
    system: str | None = None


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a generated dataset, in tokens. `range_ratio`: lengths are uniform in [ratio x length,
    length]. `groups` different prefixes of `prefix_len` tokens are shared by equal parts of the sessions."""

    count: int
    input_len: int
    output_len: int
    range_ratio: float = 1.0
    groups: int = 1
    prefix_len: int = 0
    turns: int = 1
    pause: float = 0.0
    vocabulary: int = 512
    seed: int = 0


class Draw:
    """Seeded tokens and lengths. The last 1/64 of the vocabulary is left out: special tokens live there."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._random = random.Random(shape.seed)
        self._high = max(1, shape.vocabulary - max(8, shape.vocabulary // 64))

    def tokens(self, count: int) -> list[int]:
        return [self._random.randrange(self._high) for _ in range(count)]

    def length(self, most: int) -> int:
        least = max(1, round(most * self._shape.range_ratio))
        return self._random.randint(least, most) if least < most else most

    def pause(self) -> float:
        return self._random.expovariate(1 / self._shape.pause) if self._shape.pause else 0.0

    def number(self, low: int, high: int) -> int:
        return self._random.randint(low, high)


# ---------------------------------------------------------------------- generated
def conversations(shape: Shape) -> list[Session]:
    """Sessions of `turns` turns; each sends what was said so far and something new."""
    draw = Draw(shape)
    prefixes = [draw.tokens(shape.prefix_len) for _ in range(shape.groups)]
    return [
        _session(draw, shape, prefixes[i % shape.groups], [shape.input_len] * shape.turns)
        for i in range(shape.count)
    ]


def agents(shape: Shape) -> list[Session]:
    """Tool-using agents: a long common prompt and a task, then up to 2 x `turns` - 2 steps, where an
    observation is anything from a 16th of the input length to four times it, and the pause is the tool's
    time."""
    draw = Draw(shape)
    prefixes = [draw.tokens(shape.prefix_len) for _ in range(shape.groups)]
    sessions = []
    for i in range(shape.count):
        steps = draw.number(0, 2 * shape.turns - 2)
        observations = [max(1, shape.input_len * 4 // draw.number(1, 64)) for _ in range(steps)]
        sessions.append(_session(draw, shape, prefixes[i % shape.groups], [shape.input_len, *observations]))
    return sessions


def _session(draw: Draw, shape: Shape, prefix: list[int], lengths: Sequence[int]) -> Session:
    turns = []
    for k, most in enumerate(lengths):
        content = [*([] if k else prefix), *draw.tokens(draw.length(most))]
        turns.append(Turn(content, draw.length(shape.output_len), draw.pause() if k else 0.0))
    return Session(0.0, turns)


GENERATED: Mapping[str, Callable[[Shape], list[Session]]] = MappingProxyType(
    {"random": conversations, "shared-prefix": conversations, "multi-turn": conversations, "agentic": agents}
)


# ---------------------------------------------------------------------- from files
def custom_sessions(path: Path, shape: Shape) -> list[Session]:
    """At most `count` lines of JSON: {"prompt": text or token ids} or {"messages": [...]}, with "output_len"
    and "timestamp" (seconds) where known. ShareGPT's "conversations" are read too. Each user message is a
    turn; what an assistant said in the file is replaced by what the server says. Raises RequestError."""
    return [_custom(record, shape, where) for record, where in _records(path, shape.count)]


def _custom(record: Mapping[str, Any], shape: Shape, where: str) -> Session:
    due, output_len = record.get("timestamp", 0.0), record.get("output_len", shape.output_len)
    system, contents = None, [record.get("prompt")]
    if "prompt" not in record:
        said = [
            (
                message.get("role", message.get("from")),
                message.get("content", message.get("value")),
            )
            for message in record.get("messages", record.get("conversations", ()))
        ]
        contents = [text for role, text in said if role in ("user", "human")]
        system = next((text for role, text in said if role == "system"), None)
    try:
        turns = [Turn(msgspec.convert(content, Content), int(output_len)) for content in contents]
        if not turns or min(turn.output_len for turn in turns) < 1 or not all(turn.content for turn in turns):
            raise ValueError
        return Session(float(due), turns, msgspec.convert(system, str | None))
    except (ValueError, TypeError, msgspec.ValidationError):
        raise _bad_line(
            where,
            'it needs "prompt" (text or token ids) or "messages" with a user\'s text; "output_len" is 1 or '
            'more, "timestamp" seconds',
        ) from None


def traced_sessions(path: Path, shape: Shape) -> list[Session]:
    """At most `count` lines in the form of Mooncake's traces: {"timestamp": ms, "input_length": tokens,
    "output_length": tokens, "hash_ids": [...]}. Equal hash ids are equal blocks of 512 tokens."""
    blocks: dict[int, list[int]] = {}
    draw = Draw(shape)
    sessions = []
    for record, where in _records(path, shape.count):
        try:
            length, output_len = int(record["input_length"]), int(record["output_length"])
            names = [int(name) for name in record["hash_ids"]]
            due = float(record["timestamp"]) / 1000
            if length < 1 or output_len < 1:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise _bad_line(
                where, 'it needs "timestamp" (ms), "input_length", "output_length" and "hash_ids"'
            ) from None
        tokens: list[int] = []
        for name in names:
            if name not in blocks:
                blocks[name] = draw.tokens(BLOCK)
            tokens += blocks[name]
        tokens = (tokens + draw.tokens(max(0, length - len(tokens))))[:length]
        sessions.append(Session(due, [Turn(tokens, output_len)]))
    return sessions


FILES: Mapping[str, Callable[[Path, Shape], list[Session]]] = MappingProxyType(
    {"custom": custom_sessions, "trace": traced_sessions}
)


def _records(path: Path, most: int) -> Iterator[tuple[dict[str, Any], str]]:
    """(object, "FILE line N")."""
    try:
        with path.open(encoding="utf-8") as file:
            count = 0
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                if count == most:
                    return
                count += 1
                where = f"{path} line {number}"
                try:
                    record = json.loads(line)
                except ValueError:
                    raise _bad_line(where, "it is not JSON") from None
                if not isinstance(record, dict):
                    raise _bad_line(where, "it is no JSON object")
                yield record, where
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"{path} can't be read: {error}", code="invalid_flag", param="--dataset-path"
        ) from error


def _bad_line(where: str, what: str) -> RequestError:
    return RequestError(f"{where}: {what}", code="invalid_dataset", param="--dataset-path")


# ---------------------------------------------------------------------- arrivals
def arrivals(
    count: int, per_second: float | None, seed: int, *, kind: str = "poisson", burst: int = 1
) -> list[float]:
    """Seconds at which sessions are due: a Poisson process of groups of `burst`, or evenly spaced ones; all
    at zero without a rate. The mean rate is `per_second` sessions in each case."""
    draw, now, due = random.Random(seed), 0.0, list[float]()
    while len(due) < count:
        due += [now] * min(burst, count - len(due))
        if per_second:
            now += burst / per_second if kind == "constant" else draw.expovariate(per_second / burst)
    return due


def as_text(content: Content) -> str:
    """Tokens as words; equal tokens give equal words."""
    return content if isinstance(content, str) else "".join(f" {token}" for token in content)


def with_arrivals(sessions: Sequence[Session], due: Sequence[float]) -> list[Session]:
    return [msgspec.structs.replace(session, due=at) for session, at in zip(sessions, due, strict=True)]
