"""Calls with a tag for each parameter: Qwen 3 Coder, GLM, MiniMax, DeepSeek V3.2, Step 3."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trunkline.server.tools.grammar import (
    CallFormat,
    Json,
    Parameter,
    bare_text,
    const,
    is_text,
    optional,
    parameters,
    sequence,
)
from trunkline.server.tools.parser import Emitter, Malformed, Tool, announce, attempt, close
from trunkline.text.cursor import Cursor, Waiting

MAX_NAME = 256  # characters
MAX_VALUE = 2**16  # characters of a value that is looked at as JSON


@dataclass(frozen=True)
class TaggedCalls:
    """The marks of a format, in the order in which they are written. `name_ends` that begin with `<` are
    only looked at: the mark of what follows ends the name. `key_ends` map a mark to whether the value is text
    (None: the schema tells). `wrapper` stands around one call or several. `newlines`: one on each side of
    a value is no part of it."""

    call: str
    name_ends: tuple[str, ...]
    key: str
    key_ends: tuple[tuple[str, bool | None], ...]
    value_end: str
    end: str
    wrapper: tuple[str, str] | None = None
    newlines: bool = False

    def __call__(self, cursor: Cursor, emitter: Emitter) -> Waiting[None]:
        marks = (self.call, self.wrapper[0]) if self.wrapper else (self.call,)
        while mark := (yield from cursor.until(marks, emitter.text)):
            yield from attempt(cursor, emitter, mark, self._calls(cursor, emitter, mark))

    def _calls(self, cursor: Cursor, emitter: Emitter, mark: str) -> Waiting[None]:
        if mark != self.call:
            yield from cursor.blanks()
            if not (yield from cursor.take(self.call)):
                raise Malformed
        while True:
            yield from self._call(cursor, emitter)
            yield from cursor.blanks()
            if not (yield from cursor.take(self.call)):
                break
        if self.wrapper:
            yield from cursor.take(self.wrapper[1])

    def _call(self, cursor: Cursor, emitter: Emitter) -> Waiting[None]:
        parts: list[str] = []
        ended = yield from cursor.until(self.name_ends, parts.append, MAX_NAME)
        if ended.startswith("<"):
            cursor.skip(-len(ended))
        name = "".join(parts).strip()
        if not ended or not name or not set(name).isdisjoint('<>"{}\n'):
            raise Malformed
        yield from cursor.blanks()
        first = yield from cursor.take(self.key, self.end)
        if not first:
            raise Malformed
        announce(cursor, emitter, name)
        cursor.hold(first)
        tool = emitter.tools.get(name, Tool(name))
        separator = "{"
        while first == self.key:
            yield from self._parameter(cursor, emitter, tool, separator)
            separator = ", "
            cursor.hold()
            yield from cursor.blanks()
            first = yield from cursor.take(self.key, self.end)
        emitter.arguments("{}" if separator == "{" else "}")
        if not first:
            raise Malformed
        close(cursor, emitter)

    def _parameter(self, cursor: Cursor, emitter: Emitter, tool: Tool, separator: str) -> Waiting[None]:
        parts: list[str] = []
        marks = [mark for mark, _ in self.key_ends]
        ended = yield from cursor.until(marks, parts.append, MAX_NAME)
        key = "".join(parts).strip()
        if not ended:
            emitter.arguments("{}" if separator == "{" else "}")
            raise Malformed
        cursor.release()
        emitter.arguments(f"{separator}{_quoted(key)}: ")
        schema = tool.property(key)
        text = dict(self.key_ends)[ended]
        value = _Value(emitter.arguments, is_text(schema) if text is None else text, self.newlines)
        yield from cursor.until((self.value_end,), value.add)
        value.finish(schema)


class _Value:
    """A parameter's value on its way to JSON: text goes on as it comes."""

    def __init__(self, sink: Callable[[str], None], text: bool, newlines: bool) -> None:
        self._sink = sink
        self._text = text
        self._newlines = newlines
        self._begun = False
        self._held = ""

    def add(self, piece: str) -> None:
        self._held += piece
        if not self._text:
            return
        if not self._begun and self._held:
            self._begun = True
            self._sink('"')
            if self._newlines:
                self._held = self._held.removeprefix("\n")
        keep = 1 if self._newlines and self._held.endswith("\n") else 0
        self._sink(_quoted(self._held[: len(self._held) - keep])[1:-1])
        self._held = self._held[len(self._held) - keep :]

    def finish(self, schema: Any) -> None:
        if self._text:
            self._sink('"' if self._begun else '""')
            return
        text = self._held.removeprefix("\n").removesuffix("\n") if self._newlines else self._held
        self._sink(_as_json(text, schema))


def _as_json(text: str, schema: Any) -> str:
    """A value that is not known to be text: JSON if it is that, or a Python constant, else text."""
    stripped = text.strip()
    if len(stripped) <= MAX_VALUE:
        for read in (json.loads, ast.literal_eval):
            try:
                return json.dumps(read(stripped), ensure_ascii=False, allow_nan=False)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                continue
    return _quoted(text)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


# ---------------------------------------------------------------------- grammar
def tagged_call(
    begin: Callable[[str], str],
    key: Callable[[Parameter], str],
    value_end: str,
    end: str,
    *,
    before_end: str = "",
    after_value: str = "",
) -> CallFormat:
    """Parameters in the order of the schema; those that are not required may be left out. `before_end` stands
    before `value_end`, but for free text, of which it would be a part."""

    def one(parameter: Parameter) -> Json:
        content: Json = {"type": "json_schema", "json_schema": parameter.schema}
        close = before_end + value_end
        if parameter.text:
            content = bare_text(parameter.schema, parameter.name)
            close = value_end if content["type"] == "any_text" else close
        tag = {"type": "tag", "begin": key(parameter), "content": content, "end": close}
        written = sequence([tag, const(after_value)]) if after_value else tag
        return written if parameter.required else optional(written)

    def call(tool: Tool) -> Json:
        content = sequence([one(parameter) for parameter in parameters(tool)])
        return {"type": "tag", "begin": begin(tool.name), "content": content, "end": end}

    return call
