"""Random programs: run lazily, with calls that end in any order, they say what they say step by step."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from typing import Any
from zlib import crc32

import pytest

import trunkline as sgl
from tests.pure.lang.fake import FakeBackend
from trunkline.lang.backends.backend import Piece, Prompt
from trunkline.lang.ir import Sampling

PROGRAMS = 300


class Jittery(FakeBackend):
    """What it says depends on the text alone, and how long it takes, on chance."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.chance = random.Random(seed)

    async def generate(self, prompt: Prompt, sampling: Sampling, stream: bool) -> AsyncGenerator[Piece, None]:
        await asyncio.sleep(self.chance.choice([0, 0, 0.0005, 0.002]))
        yield f"<{crc32(prompt.text.encode()) % 1000}>", {}


def act(s: Any, chance: random.Random, depth: int, seen: list[Any]) -> None:
    """Some steps of a program, the same for the same `chance`."""
    for _ in range(chance.randint(1, 6)):
        name = chance.choice("abcd")
        match chance.choice(("fill", "gen", "gen", "set", "scope", "read", "role", "fork", "copy", "select")):
            case "fill":
                s += chance.choice(["x", "yy", "z z"])
            case "gen":
                s += "-" + sgl.gen(name)
            case "set":
                s[name] = chance.randint(0, 9)
            case "scope":
                with s.var_scope(name):
                    s += "(" + sgl.gen() + ")"
            case "select":
                s += sgl.select(name, ["p", "q"])
            case "read":
                if name in s:
                    seen.append((name, s[name]))
            case "role" if depth == 0:
                s += sgl.user(sgl.gen(name))
            case "fork" if depth < 2:
                forks = s.fork(chance.randint(1, 3))
                for one in forks:
                    act(one, chance, depth + 1, seen)
                forks.join(chance.choice(["gather_variable", "concate_and_append"]))
            case "copy" if depth < 2:
                with s.copy() as one:
                    act(one, chance, depth + 1, seen)
                seen.append(one.text())


@sgl.function
def program(s: Any, seed: int) -> list[Any]:
    seen: list[Any] = []
    act(s, random.Random(seed), 0, seen)
    return seen


def outcome(state: Any) -> tuple[Any, ...]:
    state.sync()
    return state.text(), state.messages(), dict(state.stream_executor.variables), state.ret_value


@pytest.mark.parametrize("stream", [False, True])
def test_lazy_is_what_eager_is(stream: bool) -> None:
    wanted = [outcome(program.run(i, backend=Jittery(i), use_thread=False)) for i in range(PROGRAMS // 10)]
    for i, expected in enumerate(wanted):
        state = program.run(i, backend=Jittery(i + 7), stream=stream)
        assert "".join(state.text_iter()) == expected[0]
        assert outcome(state) == expected


def test_a_batch_is_what_single_runs_are() -> None:
    wanted = [outcome(program.run(i, backend=Jittery(i))) for i in range(PROGRAMS)]
    states = program.run_batch([(i,) for i in range(PROGRAMS)], backend=Jittery(1), num_threads=16)
    assert list(map(outcome, states)) == wanted
    assert len({text for text, *_ in wanted}) > PROGRAMS / 2  # they differ
