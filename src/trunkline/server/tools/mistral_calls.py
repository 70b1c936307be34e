"""Mistral's calls behind [TOOL_CALLS]: a JSON list, or, from version 11 of its tokenizer on, a name and
arguments for each."""

from __future__ import annotations

import re

from trunkline.server.tools.headed_calls import HeadedCalls
from trunkline.server.tools.json_calls import JsonCalls
from trunkline.server.tools.parser import Emitter, attempt
from trunkline.text.cursor import Cursor, Waiting

MARK, ARGUMENTS = "[TOOL_CALLS]", "[ARGS]"
_LIST = JsonCalls((MARK,))
_HEADER = re.compile(r"\s*(?P<name>[\w.-]+)\s*(?:\[CALL_ID\]\s*(?P<id>\w+))?\s*")
_NAMED = HeadedCalls((MARK,), (ARGUMENTS, "{"), _HEADER)


def mistral(cursor: Cursor, emitter: Emitter) -> Waiting[None]:
    while mark := (yield from cursor.until((MARK,), emitter.text)):
        yield from attempt(cursor, emitter, mark, _either(cursor, emitter))


def _either(cursor: Cursor, emitter: Emitter) -> Waiting[None]:
    first = yield from cursor.blanks()
    yield from (_LIST.calls if first and first in "[{" else _NAMED.call)(cursor, emitter)
