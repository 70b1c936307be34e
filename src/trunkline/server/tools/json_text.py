"""JSON values in streamed text, read as far as needed to find their end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

from trunkline.server.tools.parser import Malformed
from trunkline.text.cursor import Cursor, Waiting

MAX_NAME = 4096  # characters of a key or a name, in quotes
_CLOSERS: Mapping[str, str] = {"{": "}", "[": "]"}
_PLAIN = re.compile(r'[^"\\{}\[\]]+')
_IN_STRING = re.compile(r'[^"\\]+')


def read_value(cursor: Cursor, sink: Callable[[str], None]) -> Waiting[None]:
    """Pass one value to `sink` as it is written; ends with its last character, or with the text. Raises
    Malformed where brackets don't match: what stands there is not read."""
    first = yield from cursor.blanks()
    if first in _CLOSERS:
        yield from _nested(cursor, sink)
    elif first == '"':
        yield from _string(cursor, sink)
    elif not first or first in ",:]}":
        raise Malformed
    else:
        while (char := (yield from cursor.peek(1))) and not (char in ",]}" or char.isspace()):
            sink(char)
            cursor.skip(1)


def _nested(cursor: Cursor, sink: Callable[[str], None]) -> Waiting[None]:
    expected: list[str] = []
    while char := (yield from cursor.peek(1)):
        if char == '"':
            yield from _string(cursor, sink)
            continue
        plain = _PLAIN.match(cursor.rest())
        if plain:
            sink(plain[0])
            cursor.skip(plain.end())
            continue
        if char in _CLOSERS:
            expected.append(_CLOSERS[char])
        elif char in "}]" and char != expected.pop():
            raise Malformed
        sink(char)
        cursor.skip(1)
        if not expected:
            return


def _string(cursor: Cursor, sink: Callable[[str], None], limit: int = 0) -> Waiting[None]:
    """Raises Malformed after `limit` characters (0: no limit)."""
    sink('"')
    cursor.skip(1)
    size = 1
    while char := (yield from cursor.peek(1)):
        plain = _IN_STRING.match(cursor.rest())
        part = plain[0] if plain else (yield from cursor.peek(2)) if char == "\\" else char
        if limit:
            part = part[: limit - size]
        sink(part)
        cursor.skip(len(part))
        size += len(part)
        if char == '"':
            return
        if size == limit:
            raise Malformed


def read_string(cursor: Cursor) -> Waiting[str]:
    """The value of a string. Raises Malformed for anything else, and for one longer than MAX_NAME."""
    if (yield from cursor.blanks()) != '"':
        raise Malformed
    parts: list[str] = []
    yield from _string(cursor, parts.append, MAX_NAME)
    try:
        value = json.loads("".join(parts), strict=False)
    except ValueError:
        raise Malformed from None
    assert isinstance(value, str)
    return value
