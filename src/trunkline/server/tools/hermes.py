"""Tool calls written as `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes, Qwen)."""

from __future__ import annotations

import json
from dataclasses import dataclass

import msgspec

from trunkline.text.stop import StopMatcher

BEGIN, END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    """`arguments` is JSON text, as the OpenAI interface has it."""

    name: str
    arguments: str


class HermesParser:
    """Splits streamed text into plain text and tool calls; where the text is cut makes no difference.

    What looks like a call but is none (no JSON object with a name) stays text, markers included. White space
    around calls is dropped.
    """

    def __init__(self) -> None:
        self._outside = StopMatcher([BEGIN])
        self._inside: str | None = None  # text since BEGIN, when in a call
        self._spaces = ""  # held back: dropped if a call follows
        self._after_call = False

    def feed(self, text: str) -> list[str | ToolCall]:
        """Text that is certainly no tool call, and calls that are complete."""
        parts: list[str | ToolCall] = []
        for char in text:  # one at a time: the same states whatever the pieces were
            if self._inside is None:
                parts += self._plain(self._outside.feed(char))
                if self._outside.matched is not None:
                    self._outside, self._inside = StopMatcher([BEGIN]), ""
            else:
                self._inside += char
                if self._inside.endswith(END):
                    parts += self._finish(self._inside[: -len(END)])
                    self._inside = None
        return _joined(parts)

    def flush(self) -> list[str | ToolCall]:
        """The text is over: an unfinished call is text."""
        rest = self._outside.flush() if self._inside is None else BEGIN + self._inside
        self._inside = None
        parts = self._plain(rest)
        if not self._after_call:
            parts.append(self._spaces)
        return _joined(parts)

    def _plain(self, text: str) -> list[str | ToolCall]:
        shown = self._spaces + text
        if self._after_call:
            shown = shown.lstrip()
        visible = shown.rstrip()
        self._spaces = shown[len(visible) :]
        if visible:
            self._after_call = False
        return [visible]

    def _finish(self, body: str) -> list[str | ToolCall]:
        call = _parse(body)
        if call is None:
            return self._plain(BEGIN + body + END)
        self._after_call = True
        return [call]


def _parse(body: str) -> ToolCall | None:
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))


def _joined(parts: list[str | ToolCall]) -> list[str | ToolCall]:
    joined: list[str | ToolCall] = []
    for part in parts:
        if joined and isinstance(part, str) and isinstance(joined[-1], str):
            joined[-1] += part
        elif part:
            joined.append(part)
    return joined
