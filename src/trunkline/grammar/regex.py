"""Regular expressions as values: what a pattern means, in terms of code points, for any backend.

The syntax read is ECMA-262's with the u flag, which is what JSON Schema's `pattern` is in; the part that is
not regular (lookaround, backreferences) or depends on context (word boundaries) is refused. Nodes are
hashable and built through `concat`, `union`, `both` and `negate`, which keep them in a simple form.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn

from trunkline.grammar.protocol import GrammarError

LAST = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)
MAX_REPEAT = 100_000
MAX_NESTING = 100

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Chars:
    """One character out of sorted, disjoint, inclusive ranges of code points; none: the empty language."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Concat:
    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Union:
    options: frozenset[Node]


@dataclass(frozen=True, slots=True)
class Repeat:
    node: Node
    low: int
    high: int | None  # None: no bound


@dataclass(frozen=True, slots=True)
class Both:
    parts: frozenset[Node]


@dataclass(frozen=True, slots=True)
class Not:
    node: Node


@dataclass(frozen=True, slots=True)
class Anchor:
    """`^` or `$`; gone after `search_language`."""

    end: bool


Node = Chars | Concat | Union | Repeat | Both | Not | Anchor

NOTHING = Chars(())
EMPTY = Concat(())


def normal_ranges(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Sorted and merged, without surrogates, which no text holds."""
    clipped = []
    for low, high in ranges:
        clipped += [(low, min(high, SURROGATES[0] - 1)), (max(low, SURROGATES[1] + 1), high)]
    merged: list[tuple[int, int]] = []
    for low, high in sorted(pair for pair in clipped if pair[0] <= pair[1]):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def complement(ranges: Ranges) -> Ranges:
    gaps = []
    start = 0
    for low, high in ranges:
        gaps.append((start, low - 1))
        start = high + 1
    return normal_ranges([*gaps, (start, LAST)])


ANY = Chars(complement(()))


# ------------------------------------------------------------------ building
def chars(*ranges: tuple[str, str]) -> Chars:
    return Chars(normal_ranges((ord(low), ord(high)) for low, high in ranges))


def literal(text: str) -> Node:
    return concat(Chars(((ord(char), ord(char)),)) for char in text)


def concat(parts: Iterable[Node]) -> Node:
    flat: list[Node] = []
    for part in parts:
        if part == NOTHING:
            return NOTHING
        flat += part.parts if isinstance(part, Concat) else [part]
    return flat[0] if len(flat) == 1 else Concat(tuple(flat))


def union(options: Iterable[Node]) -> Node:
    flat: set[Node] = set()
    single: list[tuple[int, int]] = []
    for option in options:
        for node in option.options if isinstance(option, Union) else (option,):
            if isinstance(node, Chars):
                single += node.ranges
            else:
                flat.add(node)
    if single:
        flat.add(Chars(normal_ranges(single)))
    if EVERYTHING in flat:
        return EVERYTHING
    return NOTHING if not flat else flat.pop() if len(flat) == 1 else Union(frozenset(flat))


def both(parts: Iterable[Node]) -> Node:
    """Intersection."""
    flat: set[Node] = set()
    for part in parts:
        flat |= part.parts if isinstance(part, Both) else {part}
    flat.discard(EVERYTHING)
    if NOTHING in flat:
        return NOTHING
    return EVERYTHING if not flat else flat.pop() if len(flat) == 1 else Both(frozenset(flat))


def negate(node: Node) -> Node:
    if isinstance(node, Not):
        return node.node
    return EVERYTHING if node == NOTHING else NOTHING if node == EVERYTHING else Not(node)


def repeat(node: Node, low: int, high: int | None) -> Node:
    if high == 0 or (node == NOTHING and low == 0) or node == EMPTY:
        return EMPTY
    if node == NOTHING or (low, high) == (1, 1):
        return node
    return Repeat(node, low, high)


def is_plain(node: Node) -> bool:
    """Is it without intersections, complements and anchors?"""
    match node:
        case Chars():
            return True
        case Concat(parts):
            return all(is_plain(part) for part in parts)
        case Union(options):
            return all(is_plain(option) for option in options)
        case Repeat(inner, _, _):
            return is_plain(inner)
        case Both() | Not() | Anchor():
            return False


EVERYTHING: Node = Repeat(ANY, 0, None)

DIGIT = chars(("0", "9"))
WORD = chars(("0", "9"), ("A", "Z"), ("a", "z"), ("_", "_"))
_BLANKS = (*range(9, 14), 32, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)
SPACE = Chars(normal_ranges((code, code) for code in (*_BLANKS, 0xFEFF)))
NOT_NEWLINE = Chars(complement(((10, 10), (13, 13), (0x2028, 0x2029))))
CLASSES = frozenset({("d", DIGIT), ("w", WORD), ("s", SPACE)})
CONTROLS = frozenset({("t", 9), ("n", 10), ("v", 11), ("f", 12), ("r", 13), ("0", 0)})


@lru_cache(maxsize=64)
def property_ranges(name: str) -> Ranges | None:
    """Code points of a general category (`L`, `Lu`, `Letter`, ...); None for a name that is none of them."""
    long = {"Letter": "L", "Mark": "M", "Number": "N", "Punctuation": "P", "Symbol": "S", "Separator": "Z"}
    long |= {"Uppercase_Letter": "Lu", "Lowercase_Letter": "Ll", "Decimal_Number": "Nd"}
    name = long.get(name.removeprefix("General_Category=").removeprefix("gc="), name)
    found = [(code, code) for code in range(LAST + 1) if unicodedata.category(chr(code)).startswith(name)]
    return normal_ranges(found) if found and len(name) <= 2 else None


# ------------------------------------------------------------------ reading a pattern
def parse(pattern: str) -> Node:
    """The node of a pattern, with anchors where they stand. Raises GrammarError naming the offset."""
    return _Parser(pattern).parse()


def search_language(pattern: str) -> Node:
    """Texts in which the pattern is found somewhere: JSON Schema's reading of `pattern`."""
    return _close(parse(pattern), EVERYTHING, pattern)


def match_language(pattern: str) -> Node:
    """Texts that the pattern matches from start to end; anchors at the ends say nothing more."""
    return _close(parse(pattern), EMPTY, pattern)


def _close(node: Node, around: Node, pattern: str) -> Node:
    """Replace the anchors at the ends of each branch, and put `around` where a branch has none."""
    options = [*_branches(node, pattern)]
    closed = []
    for parts in options:
        start, end = 0, len(parts)
        while start < end and parts[start] == Anchor(False):
            start += 1
        while end > start and parts[end - 1] == Anchor(True):
            end -= 1
        inner = parts[start:end]
        if any(_has_anchor(part) for part in inner):
            _refuse("an anchor inside of a pattern, where no text can match or context decides", pattern)
        left = [] if start else [around]
        closed.append(concat([*left, *inner, *([] if end < len(parts) else [around])]))
    return union(closed)


def _branches(node: Node, pattern: str) -> Iterator[tuple[Node, ...]]:
    """The alternatives of a node as sequences, with groups at either end spread out if they hold anchors."""
    if isinstance(node, Union):
        for option in node.options:
            yield from _branches(option, pattern)
    elif isinstance(node, Concat) and node.parts:
        first, *rest = node.parts
        if isinstance(first, Union) and _has_anchor(first):
            for option in first.options:
                yield from _branches(concat([option, *rest]), pattern)
        elif isinstance(node.parts[-1], Union) and _has_anchor(node.parts[-1]):
            for option in node.parts[-1].options:
                yield from _branches(concat([*node.parts[:-1], option]), pattern)
        else:
            yield node.parts
    else:
        yield (node,)


def _has_anchor(node: Node) -> bool:
    match node:
        case Anchor():
            return True
        case Concat(parts):
            return any(_has_anchor(part) for part in parts)
        case Union(options):
            return any(_has_anchor(option) for option in options)
        case Repeat(inner, _, _):
            return _has_anchor(inner)
        case _:
            return False


def _refuse(what: str, pattern: str) -> NoReturn:
    shown = pattern if len(pattern) <= 80 else pattern[:80] + "..."
    raise GrammarError(f"{what}, in the pattern {shown!r}", code="unsupported_grammar")


class _Parser:
    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._at = 0
        self._depth = 0

    def parse(self) -> Node:
        node = self._alternatives()
        if self._at < len(self._text):
            self._fail("unbalanced )")
        return node

    def _fail(self, what: str) -> NoReturn:
        raise GrammarError(f"{what} at offset {self._at} of the pattern", code="invalid_grammar")

    def _unsupported(self, what: str) -> NoReturn:
        raise GrammarError(
            f"{what} at offset {self._at} of the pattern can't be enforced", code="unsupported_grammar"
        )

    def _peek(self, text: str) -> bool:
        return self._text.startswith(text, self._at)

    def _take(self, text: str) -> bool:
        if self._peek(text):
            self._at += len(text)
            return True
        return False

    def _next(self) -> str:
        if self._at >= len(self._text):
            self._fail("unexpected end")
        self._at += 1
        return self._text[self._at - 1]

    def _alternatives(self) -> Node:
        self._depth += 1
        if self._depth > MAX_NESTING:
            raise GrammarError("groups of a pattern are nested too deep", code="grammar_too_complex")
        options = [self._sequence()]
        while self._take("|"):
            options.append(self._sequence())
        self._depth -= 1
        return union(options)

    def _sequence(self) -> Node:
        parts: list[Node] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            atom = self._atom()
            bounds = self._quantifier()
            if bounds is not None:
                if _has_anchor(atom):
                    self._unsupported("a repeated anchor")
                atom = repeat(atom, *bounds)
            parts.append(atom)
        return concat(parts)

    def _quantifier(self) -> tuple[int, int | None] | None:
        bounds: tuple[int, int | None]
        if self._take("*"):
            bounds = (0, None)
        elif self._take("+"):
            bounds = (1, None)
        elif self._take("?"):
            bounds = (0, 1)
        elif (counted := self._counted()) is not None:
            bounds = counted
        else:
            return None
        self._take("?")  # lazy: the same language
        if self._at < len(self._text) and self._text[self._at] in "*+?":
            self._fail("nothing to repeat")
        return bounds

    def _counted(self) -> tuple[int, int | None] | None:
        """`{n}`, `{n,}` or `{n,m}`; a brace that starts none of them stands for itself."""
        end = self._text.find("}", self._at)
        if not self._peek("{") or end < 0:
            return None
        low, comma, high = self._text[self._at + 1 : end].partition(",")
        if not (low.isascii() and low.isdecimal() and (high == "" or (high.isascii() and high.isdecimal()))):
            return None
        if len(low) > 6 or len(high) > 6 or max(int(low), int(high or 0)) > MAX_REPEAT:
            raise GrammarError(f"a pattern repeats over {MAX_REPEAT} times", code="grammar_too_complex")
        self._at = end + 1
        upper = int(high) if high else None if comma else int(low)
        if upper is not None and upper < int(low):
            self._fail("numbers out of order in a quantifier")
        return int(low), upper

    def _atom(self) -> Node:
        char = self._next()
        match char:
            case "(":
                return self._group()
            case "[":
                return self._char_class()
            case ".":
                return NOT_NEWLINE
            case "^":
                return Anchor(False)
            case "$":
                return Anchor(True)
            case "\\":
                return self._escape(in_class=False)
            case "*" | "+" | "?":
                self._at -= 1
                self._fail("nothing to repeat")
        return Chars(self._single(ord(char)))

    def _single(self, code: int) -> Ranges:
        if SURROGATES[0] <= code <= SURROGATES[1]:
            self._unsupported("a lone surrogate")
        return ((code, code),)

    def _group(self) -> Node:
        if self._peek("?"):
            for mark, name in (("?=", "lookahead"), ("?!", "lookahead"), ("?<=", "lookbehind")):
                if self._peek(mark):
                    self._unsupported(name)
            if self._peek("?<!"):
                self._unsupported("lookbehind")
            if self._take("?<") or self._take("?P<"):
                end = self._text.find(">", self._at)
                if end < 0 or not self._text[self._at : end].isidentifier():
                    self._fail("bad group name")
                self._at = end + 1
            elif not self._take("?:"):
                self._unsupported("a group with flags")
        node = self._alternatives()
        if not self._take(")"):
            self._fail("missing )")
        return node

    def _escape(self, *, in_class: bool) -> Chars:
        char = self._next()
        for name, found in CLASSES:
            if char == name:
                return found
            if char == name.upper():
                return Chars(complement(found.ranges))
        if char in "pP":
            return self._property(negative=char == "P")
        if char == "b" and in_class:
            return Chars(((8, 8),))
        if char in "bBAZzGkK" or char in "123456789":
            self._at -= 1
            self._unsupported("a backreference" if char in "k123456789" else f"\\{char}")
        return Chars(self._single(self._escaped_code(char)))

    def _escaped_code(self, char: str) -> int:
        for name, code in CONTROLS:
            if char == name:
                return code
        if char == "c" and self._at < len(self._text) and self._text[self._at].isascii():
            return ord(self._next().upper()) % 32
        if char == "x":
            return self._hex(2)
        if char == "u":
            if self._take("{"):
                end = self._text.find("}", self._at)
                code = self._hex(max(end - self._at, 0))
                self._at += 1
                return code
            code = self._hex(4)
            if 0xD800 <= code <= 0xDBFF and self._take("\\u"):
                return 0x10000 + ((code - 0xD800) << 10) + (self._hex(4) - 0xDC00)
            return code
        if char.isalnum() and char.isascii():
            self._fail(f"unknown escape \\{char}")
        return ord(char)

    def _hex(self, digits: int) -> int:
        text = self._text[self._at : self._at + digits]
        if not 1 <= digits <= 6 or len(text) < digits or any(c not in "0123456789abcdefABCDEF" for c in text):
            self._fail("bad hexadecimal escape")
        if int(text, 16) > LAST:
            self._fail("no such code point")
        self._at += digits
        return int(text, 16)

    def _property(self, *, negative: bool) -> Chars:
        end = self._text.find("}", self._at)
        if not self._take("{") or end < 0:
            self._fail("bad property escape")
        ranges = property_ranges(self._text[self._at : end])
        if ranges is None:
            self._unsupported(f"property {self._text[self._at : end][:30]!r}")
        self._at = end + 1
        return Chars(complement(ranges) if negative else ranges)

    def _char_class(self) -> Node:
        negative = self._take("^")
        ranges: list[tuple[int, int]] = []
        while not self._take("]"):
            low = self._class_atom()
            one = len(low) == 1 and low[0][0] == low[0][1]
            if one and self._peek("-") and not self._peek("-]"):
                self._at += 1
                high = self._class_atom()
                if len(high) != 1 or high[0][0] != high[0][1] or high[0][0] < low[0][0]:
                    self._fail("bad range in a class")
                low = ((low[0][0], high[0][0]),)
            ranges += low
        merged = normal_ranges(ranges)
        return Chars(complement(merged) if negative else merged)

    def _class_atom(self) -> Ranges:
        char = self._next()
        return self._escape(in_class=True).ranges if char == "\\" else self._single(ord(char))
