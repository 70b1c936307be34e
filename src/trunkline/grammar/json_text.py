"""How values are written as JSON: languages of texts in quotes, constants, blanks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from trunkline.grammar.numbers import plain_text
from trunkline.grammar.regex import (
    ANY,
    EVERYTHING,
    Anchor,
    Both,
    Chars,
    Concat,
    Node,
    Not,
    Ranges,
    Repeat,
    Union,
    both,
    chars,
    complement,
    concat,
    literal,
    negate,
    normal_ranges,
    repeat,
    union,
)

_QUOTE = literal('"')
_ESCAPED: Ranges = normal_ranges([(0, 0x1F), (0x22, 0x22), (0x5C, 0x5C)])  # can't stand for themselves
_HEX = chars(("0", "9"), ("a", "f"), ("A", "F"))


@dataclass(frozen=True)
class Layout:
    """Blanks in JSON: how many may follow `,` and `:`. There are none elsewhere: nobody is trapped in them.

    The default takes both `{"a": 1, "b": 2}` and `{"a":1,"b":2}`; "never" and "always" force more text.
    """

    spaces: str = "optional"

    def after(self, mark: str) -> Node:
        low, high = {"never": (0, 0), "optional": (0, 1), "always": (1, 1)}[self.spaces]
        return concat([literal(mark), repeat(literal(" "), low, high)])


def _hex(code: int) -> Node:
    digits = f"{code:04x}"
    return concat(union([literal(digit), literal(digit.upper())]) for digit in digits)


def _escape(code: int) -> Node:
    short = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r", 0x22: '"', 0x5C: "\\"}.get(code)
    return concat([literal("\\u"), _hex(code)]) if short is None else literal("\\" + short)


def _free_char() -> Node:
    """A character in any of its spellings: raw, with a short escape, with \\u (two for the higher planes)."""
    raw = Chars(complement(_ESCAPED))
    short = concat([literal("\\"), Chars(normal_ranges((ord(c), ord(c)) for c in '"\\/bfnrt'))])
    three = repeat(_HEX, 3, 3)
    lower = concat([chars(("d", "d"), ("D", "D")), chars(("0", "7")), repeat(_HEX, 2, 2)])
    others = concat([chars(("0", "9"), ("a", "c"), ("A", "C"), ("e", "f"), ("E", "F")), three])
    high = concat(
        [chars(("d", "d"), ("D", "D")), chars(("8", "9"), ("a", "b"), ("A", "B")), repeat(_HEX, 2, 2)]
    )
    low = concat([chars(("d", "d"), ("D", "D")), chars(("c", "f"), ("C", "F")), repeat(_HEX, 2, 2)])
    code = union([lower, others, concat([high, literal("\\u"), low])])
    return union([raw, short, concat([literal("\\u"), code])])


FREE_CHAR = _free_char()


def free_string(low: int, high: int | None) -> Node:
    """Any text of so many code points."""
    return concat([_QUOTE, repeat(FREE_CHAR, low, high), _QUOTE])


def quoted(node: Node) -> Node:
    """The texts of a language as JSON strings, each character in one spelling: raw where it may be.

    Intersections and complements come to stand outside of the quotes, where llguidance is much faster.
    """
    match node:
        case Both(parts):
            return both([quoted(part) for part in parts])
        case Not(inner):
            return both([quoted(EVERYTHING), negate(quoted(inner))])
    return concat([_QUOTE, _spelled(node), _QUOTE])


def _spelled(node: Node) -> Node:
    match node:
        case Chars(ranges):
            raw: list[tuple[int, int]] = []
            escaped: list[Node] = []
            for low, high in ranges:
                escaped += [_escape(c) for c in (*range(0x20), 0x22, 0x5C) if low <= c <= high]
                raw += _without_escaped(low, high)
            return union([Chars(normal_ranges(raw)), *escaped])
        case Concat(parts):
            return concat([_spelled(part) for part in parts])
        case Union(options):
            return union([_spelled(option) for option in options])
        case Both(parts_):
            return both([_spelled(part) for part in parts_])
        case Not(inner):
            return both([repeat(_spelled(ANY), 0, None), negate(_spelled(inner))])
        case Repeat(inner, low, bound):
            return repeat(_spelled(inner), low, bound)
        case Anchor():
            raise ValueError("anchors are resolved before")


def _without_escaped(low: int, high: int) -> list[tuple[int, int]]:
    gaps = [(0x20, 0x21), (0x23, 0x5B), (0x5D, 0x10FFFF)]
    return [(max(low, a), min(high, b)) for a, b in gaps if max(low, a) <= min(high, b)]


def constant(value: Any, layout: Layout) -> Node:
    """One value; members in the order in which it has them."""
    if isinstance(value, list):
        items = _joined([constant(item, layout) for item in value], layout)
        return concat([literal("["), *items, literal("]")])
    if isinstance(value, dict):
        members = [
            concat([constant(key, layout), layout.after(":"), constant(inner, layout)])
            for key, inner in value.items()
        ]
        return concat([literal("{"), *_joined(members, layout), literal("}")])
    if isinstance(value, Decimal):
        return literal(plain_text(value))
    return literal(json.dumps(value, ensure_ascii=False))


def _joined(parts: list[Node], layout: Layout) -> list[Node]:
    return [
        node for index, part in enumerate(parts) for node in ([layout.after(",")] if index else []) + [part]
    ]
