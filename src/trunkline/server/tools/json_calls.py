"""Calls written as JSON objects with a name and arguments: Hermes and Qwen, Llama 3, Mistral's older form,
Hunyuan, and bare JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from trunkline.server.tools.grammar import CallFormat, Json, argument_schema
from trunkline.server.tools.json_text import read_string, read_value
from trunkline.server.tools.parser import Emitter, Malformed, Tool, announce, attempt, close
from trunkline.text.cursor import Cursor, Waiting

_NAME, _ARGUMENTS, _ID = ("name",), ("arguments", "parameters"), ("id",)


@dataclass(frozen=True)
class JsonCalls:
    """`openers` begin one call or a list of them, and one of `closers` may follow. `at_start`: so does the
    beginning of the message. `known_only`: what names no tool of the request is text: nothing else tells a
    call from an answer in JSON."""

    openers: tuple[str, ...]
    closers: tuple[str, ...] = ()
    at_start: bool = False
    known_only: bool = False

    def __call__(self, cursor: Cursor, emitter: Emitter) -> Waiting[None]:
        if self.at_start and (yield from _at_json(cursor, emitter)):
            yield from attempt(cursor, emitter, "", self.calls(cursor, emitter))
        while mark := (yield from cursor.until(self.openers, emitter.text)):
            yield from attempt(cursor, emitter, mark, self.calls(cursor, emitter))

    def calls(self, cursor: Cursor, emitter: Emitter) -> Waiting[None]:
        """A list of calls, or calls with nothing, `;` or `,` between them."""
        listed = (yield from cursor.blanks()) == "["
        if listed:
            cursor.skip(1)
        while True:
            yield from self._call(cursor, emitter)
            separator = yield from cursor.blanks()
            if separator and separator in ",;":
                cursor.skip(1)
                if (yield from cursor.blanks()) == "{":
                    continue
                raise Malformed
            if separator != "{":
                break
        if listed and not (yield from cursor.take("]")):
            raise Malformed
        yield from cursor.blanks()
        if self.closers:
            yield from cursor.take(*self.closers)

    def _call(self, cursor: Cursor, emitter: Emitter) -> Waiting[None]:
        if (yield from cursor.blanks()) != "{":
            raise Malformed
        cursor.skip(1)
        name = id = ""
        early: list[str] | None = None  # arguments that came before the name
        while (char := (yield from cursor.blanks())) != "}":
            key = yield from read_string(cursor)
            if (yield from cursor.blanks()) != ":":
                raise Malformed
            cursor.skip(1)
            if key in _NAME and not emitter.open:
                name = yield from read_string(cursor)
                if self.known_only and name not in emitter.tools:
                    raise Malformed
            elif key in _ARGUMENTS and name and not emitter.open and early is None:
                yield from _arguments(cursor, emitter, name, id)
            elif key in _ARGUMENTS and not emitter.open:
                early = []
                yield from read_value(cursor, early.append)
            elif key in _ID and (yield from cursor.blanks()) == '"':
                id = yield from read_string(cursor)
            else:
                yield from read_value(cursor, lambda _: None)
            char = yield from cursor.blanks()
            if char == ",":
                cursor.skip(1)
            elif char != "}":
                raise Malformed
        cursor.skip(1)
        if not emitter.open:
            if not name:
                raise Malformed
            announce(cursor, emitter, name, id)
            emitter.arguments(_as_object("".join(early or [])))
        close(cursor, emitter)


def _at_json(cursor: Cursor, emitter: Emitter) -> Waiting[bool]:
    cursor.hold()
    found = (yield from cursor.blanks()) in ("{", "[")
    emitter.text(cursor.release())
    return found


def _arguments(cursor: Cursor, emitter: Emitter, name: str, id: str) -> Waiting[None]:
    """An object goes out as it comes; text that holds one, and null, when they are whole."""
    first = yield from cursor.blanks()
    if first == "{":
        announce(cursor, emitter, name, id)
        yield from read_value(cursor, emitter.arguments)
        return
    parts: list[str] = []
    yield from read_value(cursor, parts.append)
    arguments = _as_object("".join(parts))
    announce(cursor, emitter, name, id)
    emitter.arguments(arguments)


def _as_object(text: str) -> str:
    """Arguments that are no object: an object in a string, or nothing. Raises Malformed for others."""
    if text in ("", "null"):
        return "{}"
    try:
        value: Any = json.loads(text, strict=False)
        if isinstance(value, str):
            text, value = value, json.loads(value, strict=False)
    except (ValueError, RecursionError):
        raise Malformed from None
    if not isinstance(value, dict):
        raise Malformed
    return text


def json_call(begin: str, end: str, arguments: str = "arguments") -> CallFormat:
    """`begin`{"name": ..., `arguments`: ...}`end`."""

    def call(tool: Tool) -> Json:
        head = f'{begin}{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "{arguments}": '
        content = {"type": "json_schema", "json_schema": argument_schema(tool)}
        return {"type": "tag", "begin": head, "content": content, "end": "}" + end}

    return call
