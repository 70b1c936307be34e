"""Calls with a header that holds the name, and JSON arguments behind it: DeepSeek, Kimi, Mistral's newer
form, harmony."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from trunkline.server.tools.grammar import CallFormat, Json, argument_schema, sequence
from trunkline.server.tools.json_text import read_value
from trunkline.server.tools.parser import Emitter, Malformed, Tool, announce, attempt, close
from trunkline.text.cursor import Cursor, Waiting

MAX_HEADER = 512  # characters


@dataclass(frozen=True)
class HeadedCalls:
    """`begins` begin a header, `head_ends` end it; `header` finds the name in it (group `name`), and the id
    where there is one. `ends`: what may stand behind the arguments; each is read where it stands, in this
    order. `wrappers` stand around calls and are dropped."""

    begins: tuple[str, ...]
    head_ends: tuple[str, ...]
    header: re.Pattern[str]
    ends: tuple[str, ...] = ()
    wrappers: tuple[str, ...] = ()

    def __call__(self, cursor: Cursor, emitter: Emitter) -> Waiting[None]:
        marks = (*self.begins, *self.wrappers)
        while mark := (yield from cursor.until(marks, emitter.text)):
            if mark in self.begins:
                yield from attempt(cursor, emitter, mark, self.call(cursor, emitter))
            else:
                yield from attempt(cursor, emitter, mark, self._wrapped(cursor, emitter, mark))

    def _wrapped(self, cursor: Cursor, emitter: Emitter, mark: str) -> Waiting[None]:
        """A wrapper that has no call beside it is text."""
        yield from cursor.blanks()
        if mark in self.wrappers[1:]:
            if not emitter.after_call:
                raise Malformed
        elif not (yield from cursor.take(*self.begins)):
            raise Malformed
        else:
            yield from self.call(cursor, emitter)

    def call(self, cursor: Cursor, emitter: Emitter) -> Waiting[None]:
        parts: list[str] = []
        ended = yield from cursor.until(self.head_ends, parts.append, MAX_HEADER)
        found = self.header.fullmatch("".join(parts)) if ended else None
        if found is None:
            raise Malformed
        groups = found.groupdict()
        if ended == "{":  # it is a part of the arguments
            cursor.skip(-1)
        first = yield from cursor.blanks()
        if first != "{" and not (yield from cursor.take(*self.ends)):  # else a call without arguments
            raise Malformed
        announce(cursor, emitter, groups["name"], groups.get("id") or "")
        if first == "{":
            yield from read_value(cursor, emitter.arguments)
        else:
            emitter.arguments("{}")
        close(cursor, emitter)
        for end in self.ends:
            yield from cursor.blanks()
            yield from cursor.take(end)


def headed_call(begin: Callable[[str], str], end: str) -> CallFormat:
    """The header that `begin` makes of a name, then the arguments."""

    def call(tool: Tool) -> Json:
        content = {"type": "json_schema", "json_schema": argument_schema(tool)}
        return {"type": "tag", "begin": begin(tool.name), "content": content, "end": end}

    return call


def numbered_call(begin: Callable[[str], str], head_end: str, end: str) -> CallFormat:
    """As `headed_call`, with a number between the name and the arguments."""

    def call(tool: Tool) -> Json:
        content = {"type": "json_schema", "json_schema": argument_schema(tool)}
        number = {"type": "tag", "begin": "", "content": {"type": "regex", "pattern": "[0-9]{1,3}"}}
        inner = sequence([{**number, "end": head_end}, content])
        return {"type": "tag", "begin": begin(tool.name), "content": inner, "end": end}

    return call
