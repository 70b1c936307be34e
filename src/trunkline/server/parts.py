"""One completion in parts: reasoning, text, tool calls. Every interface writes its messages from these."""

from __future__ import annotations

from dataclasses import dataclass

from trunkline.engine.frontend import Chunk
from trunkline.server.tools.parser import Event, ToolParser


@dataclass(frozen=True)
class Thought:
    """A piece of reasoning."""

    text: str


Part = Thought | Event


class OutputParts:
    """`parser`: of tool calls, if they are looked for. `inline`: reasoning is text like all other. `whole`:
    reasoning comes in one piece, when it has ended."""

    def __init__(self, parser: ToolParser | None, *, inline: bool = False, whole: bool = False) -> None:
        self._parser = parser
        self._inline = inline
        self._whole = whole
        self._held = ""

    def feed(self, chunk: Chunk) -> list[Part]:
        last = chunk.finish is not None
        return [*self._reasoning(chunk, last), *self._answer(chunk.text, last)]

    def _reasoning(self, chunk: Chunk, last: bool) -> list[Part]:
        text = chunk.reasoning
        if self._whole:
            self._held += text
            if not (chunk.text or last):
                return []
            text, self._held = self._held, ""
        if not text:
            return []
        return [text if self._inline else Thought(text)]

    def _answer(self, text: str, last: bool) -> list[Event]:
        if self._parser is None:
            return [text] if text else []
        events = self._parser.feed(text)
        return events + self._parser.flush() if last else events
