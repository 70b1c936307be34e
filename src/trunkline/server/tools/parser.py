"""From streamed text to plain text and tool calls, piece by piece: what the parsers of all formats share.

A format is a `Program`: a generator that reads from a cursor and tells an `Emitter` what it finds. What looks
like a call but is none is text, whole. Once a call's name and the beginning of its arguments were read, it is
a call: its arguments are passed on as they come, and what is wrong in them is for the caller to see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trunkline.text.cursor import Cursor, Waiting


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. `parameters`: its JSON schema."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False

    def property(self, name: str) -> Any:
        """Schema of a parameter; {} where it has none."""
        properties = self.parameters.get("properties")
        return properties.get(name, {}) if isinstance(properties, dict) else {}


@dataclass(frozen=True)
class CallStart:
    """`id`: where the format has one of its own, else ""."""

    name: str
    id: str = ""


@dataclass(frozen=True)
class CallArguments:
    """The next piece of the arguments: JSON text."""

    text: str


@dataclass(frozen=True)
class CallEnd:
    pass


Event = str | CallStart | CallArguments | CallEnd  # str: text that belongs to no call


class Malformed(Exception):
    """What was read since `hold` is no call."""


class Emitter:
    """Collects events. White space before and after a call is dropped."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self.tools: Mapping[str, Tool] = {tool.name: tool for tool in tools}
        self.open = False  # in a call
        self._events: list[Event] = []
        self._spaces = ""  # held back: dropped if a call follows
        self.after_call = False

    def text(self, text: str) -> None:
        shown = self._spaces + text
        if self.after_call:
            shown = shown.lstrip()
        visible = shown.rstrip()
        self._spaces = shown[len(visible) :]
        if visible:
            self.after_call = False
            self._add(visible)

    def start(self, name: str, id: str = "") -> None:
        self._spaces = ""
        self._events.append(CallStart(name, id))
        self.open = True

    def arguments(self, text: str) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(last, CallArguments):
            self._events[-1] = CallArguments(last.text + text)
        elif text:
            self._events.append(CallArguments(text))

    def end(self) -> None:
        self._events.append(CallEnd())
        self.open = False
        self.after_call = True

    def finish(self) -> None:
        """The text is over."""
        if self.open:
            self.end()
        if not self.after_call:
            self._add(self._spaces)
        self._spaces = ""

    def _add(self, text: str) -> None:
        if self._events and isinstance(self._events[-1], str):
            self._events[-1] += text
        elif text:
            self._events.append(text)

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events


Program = Callable[[Cursor, Emitter], Waiting[None]]


class ToolParser:
    """Runs a program over text that comes in pieces; where it is cut makes no difference."""

    def __init__(self, program: Program, tools: Sequence[Tool]) -> None:
        self._cursor = Cursor()
        self._emitter = Emitter(tools)
        self._steps = program(self._cursor, self._emitter)

    def feed(self, text: str) -> list[Event]:
        """What this text makes certain."""
        self._cursor.push(text)
        next(self._steps, None)
        return self._emitter.take()

    def flush(self) -> list[Event]:
        """The text is over: an unfinished call is text, or ends as it is."""
        self._cursor.end()
        next(self._steps, None)
        self._emitter.finish()
        return self._emitter.take()


def attempt(cursor: Cursor, emitter: Emitter, begun: str, body: Waiting[None]) -> Waiting[None]:
    """Run `body`, which reads one call or several behind the mark `begun`. What turns out to be no call is
    text."""
    cursor.hold(begun)
    try:
        yield from body
        if emitter.open:
            emitter.end()
        cursor.release()
    except Malformed:
        if emitter.open:
            emitter.end()
        emitter.text(cursor.release())


def announce(cursor: Cursor, emitter: Emitter, name: str, id: str = "") -> None:
    """From here on it is a call; nothing of it needs to be kept."""
    cursor.release()
    emitter.start(name, id)


def close(cursor: Cursor, emitter: Emitter) -> None:
    """The call is whole; what follows may turn out to be text."""
    emitter.end()
    cursor.hold()
