"""Calls written as a Python list: `[get_weather(city="Paris"), add(a=1, b=2)]` (Llama 4, LFM 2). They are
parsed, never run."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trunkline.server.tools.grammar import CallFormat, Json, Parameter, const, optional, parameters, sequence
from trunkline.server.tools.parser import Emitter, Malformed, Tool, announce, attempt, close
from trunkline.text.cursor import Cursor, Waiting

MAX_LIST = 2**20  # characters
MAX_DEPTH = 64
_CLOSERS: Mapping[str, str] = {"(": ")", "[": "]", "{": "}"}
_PLAIN = re.compile(r"[^\"'\\()\[\]{}]+")
_CONSTANTS: Mapping[str, bool | None] = {"true": True, "false": False, "null": None}


@dataclass(frozen=True)
class PythonicCalls:
    """At the beginning of the message, or between `openers` and `closers`. Without an opener all names must
    be those of tools: nothing else tells calls from a list in an answer."""

    openers: tuple[str, ...] = ()
    closers: tuple[str, ...] = ()

    def __call__(self, cursor: Cursor, emitter: Emitter) -> Waiting[None]:
        cursor.hold()
        bare = (yield from cursor.blanks()) == "["
        emitter.text(cursor.release())
        if bare:
            yield from attempt(cursor, emitter, "", self._list(cursor, emitter, known_only=True))
        while mark := (yield from cursor.until(self.openers, emitter.text)):
            yield from attempt(cursor, emitter, mark, self._list(cursor, emitter, known_only=False))

    def _list(self, cursor: Cursor, emitter: Emitter, *, known_only: bool) -> Waiting[None]:
        if (yield from cursor.blanks()) != "[":
            raise Malformed
        calls = _calls((yield from _balanced(cursor)))
        if known_only and not all(name in emitter.tools for name, _ in calls):
            raise Malformed
        for name, arguments in calls:
            announce(cursor, emitter, name)
            emitter.arguments(json.dumps(arguments, ensure_ascii=False))
            close(cursor, emitter)
        yield from cursor.blanks()
        yield from cursor.take(*self.closers)


def _balanced(cursor: Cursor) -> Waiting[str]:
    """From a bracket to the one that closes it. Raises Malformed where there is none."""
    parts: list[str] = []
    size = 0
    expected: list[str] = []
    quote = ""
    while char := (yield from cursor.peek(1)):
        plain = _PLAIN.match(cursor.rest())
        part = plain[0][: MAX_LIST - size] if plain else char
        if char == "\\":
            part = yield from cursor.peek(2)
        elif quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in _CLOSERS:
            expected.append(_CLOSERS[char])
        elif not plain and expected.pop() != char:
            raise Malformed
        parts.append(part)
        size += len(part)
        cursor.skip(len(part))
        if not expected:
            return "".join(parts)
        if size >= MAX_LIST or len(expected) > MAX_DEPTH:
            break
    raise Malformed


def _calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    try:
        with warnings.catch_warnings(action="ignore"):  # about escapes that Python does not know
            tree = ast.parse(text.strip(), mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            raise Malformed
        return [_call(node) for node in tree.elts]
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise Malformed from None


def _call(node: ast.expr) -> tuple[str, dict[str, Any]]:
    if not isinstance(node, ast.Call) or node.args:
        raise Malformed
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise Malformed
        arguments[keyword.arg] = _value(keyword.value)
    return _dotted(node.func), arguments


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    raise Malformed


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() as text):  # JSON writes higher planes as pairs
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        case ast.Constant(value=None | bool() | int() | float()):
            return node.value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            names = [_value(key) if key is not None else None for key in keys]
            if not all(isinstance(name, str) for name in names):
                raise Malformed
            return dict(zip(names, map(_value, values), strict=True))
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
    raise Malformed


# ---------------------------------------------------------------------- grammar
def pythonic_call() -> CallFormat:
    """`name(key=value, ...)` with values as JSON, which this parser reads too. Raises ValueError for names
    that can't be written so."""

    def call(tool: Tool) -> Json:
        found = list(parameters(tool))
        for name in (*tool.name.split("."), *(parameter.name for parameter in found)):
            if not name.isidentifier():
                raise ValueError(f"{name[:100]!r} is no Python name: this model's format can't write it")
        return {"type": "tag", "begin": f"{tool.name}(", "content": _keywords(found), "end": ")"}

    return call


def _keywords(found: Sequence[Parameter]) -> Json:
    """Required ones first, then those that may be left out."""
    needed = [parameter for parameter in found if parameter.required]
    others = [parameter for parameter in found if not parameter.required]
    if needed:
        lead = [_keyword(parameter, ", " if i else "") for i, parameter in enumerate(needed)]
        return sequence([*lead, *(optional(_keyword(parameter, ", ")) for parameter in others)])
    options = [
        sequence([_keyword(first, ""), *(optional(_keyword(later, ", ")) for later in others[i + 1 :])])
        for i, first in enumerate(others)
    ]
    return optional({"type": "or", "elements": options}) if options else const("")


def _keyword(parameter: Parameter, separator: str) -> Json:
    content = {"type": "json_schema", "json_schema": parameter.schema}
    return {"type": "tag", "begin": f"{separator}{parameter.name}=", "content": content, "end": ""}
