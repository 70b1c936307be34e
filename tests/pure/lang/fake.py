"""A backend without a model: answers from a function, a log of the calls, and doors that hold calls back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, MutableSequence
from typing import Any

from trunkline.lang.backends.backend import Backend, Piece, Prompt
from trunkline.lang.chat_template import ChatTemplate, get_chat_template
from trunkline.lang.choices import ChoicesDecision
from trunkline.lang.ir import Sampling, Select


class FakeBackend(Backend):
    """`answer(text)` is what the model says after `text`; an exception in its place is raised.

    Streams a character at a time. `peak`: most calls at once.
    """

    def __init__(
        self,
        answer: Callable[[str], str | Exception] = lambda text: "answer",
        *,
        template: str = "default",
        delay: float = 0.0,
    ) -> None:
        self.answer = answer
        self.template = template
        self.delay = delay
        self.calls: MutableSequence[tuple[str, Sampling]] = []
        self.selects: list[tuple[str, Select]] = []
        self.commits: list[str] = []
        self.door: Callable[[str], bool] = lambda text: True  # a call waits until this is true
        self.running = self.peak = 0
        self.aborted = 0
        self.flushed = False

    def get_chat_template(self) -> ChatTemplate:
        return get_chat_template(self.template)

    async def generate(self, prompt: Prompt, sampling: Sampling, stream: bool) -> AsyncGenerator[Piece, None]:
        self.calls.append((prompt.text, sampling))
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await asyncio.sleep(self.delay)
            while not self.door(prompt.text):
                await asyncio.sleep(0.001)
            text = self.answer(prompt.text)
            if isinstance(text, Exception):
                raise text
            if (sampling.n or 1) > 1:
                yield [f"{text}{i}" for i in range(sampling.n or 1)], {"n": sampling.n}
                return
            for piece in text if stream else [text]:
                yield piece, {"prompt": len(prompt.text)}
                await asyncio.sleep(0)
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted += 1
            raise
        finally:
            self.running -= 1

    async def select(self, prompt: Prompt, select: Select) -> ChoicesDecision:
        self.selects.append((prompt.text, select))
        return ChoicesDecision(select.choices[-1], {"scores": [0.0] * len(select.choices)})

    async def commit(self, prompt: Prompt) -> None:
        self.commits.append(prompt.text)

    async def flush(self) -> None:
        self.flushed = True

    async def server_info(self) -> dict[str, Any]:
        return {"version": "fake"}
