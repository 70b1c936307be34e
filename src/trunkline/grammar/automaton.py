"""Questions about regular languages, answered with derivatives (Brzozowski 1964; Owens, Reppy, Turon 2009).

Works on the nodes of `regex`, so intersection and complement cost nothing to build. Every question has a
budget of derivatives: beyond it the answer is a GrammarError, never a guess.
"""

from __future__ import annotations

from collections import deque

from trunkline.grammar.protocol import GrammarError
from trunkline.grammar.regex import (
    EMPTY,
    NOTHING,
    Anchor,
    Both,
    Chars,
    Concat,
    Node,
    Not,
    Repeat,
    Union,
    both,
    concat,
    is_plain,
    negate,
    repeat,
    union,
)

MAX_DERIVATIVES = 20_000


class Automaton:
    """Derivatives of any number of nodes, remembered, within one budget."""

    def __init__(self, budget: int = MAX_DERIVATIVES) -> None:
        self._left = budget
        self._derivatives: dict[tuple[Node, int], Node] = {}

    def accepts(self, node: Node, text: str) -> bool:
        for char in text:
            node = self.derivative(node, ord(char))
        return nullable(node)

    def is_empty(self, node: Node) -> bool:
        if is_plain(node):  # a part without texts would have made all of it NOTHING
            return node == NOTHING
        return self.example(node) is None

    def example(self, node: Node) -> str | None:
        """A shortest text of the language; None if there is none."""
        symbols = representatives(node)
        seen = {node}
        queue = deque([(node, "")])
        while queue:
            state, text = queue.popleft()
            if nullable(state):
                return text
            for code in symbols:
                following = self.derivative(state, code)
                if following != NOTHING and following not in seen:
                    seen.add(following)
                    queue.append((following, text + chr(code)))
        return None

    def words(self, node: Node, limit: int) -> list[str] | None:
        """All texts of a language of at most `limit` texts; None if there are more."""
        if self.is_empty(node):
            return []
        found = []
        queue = deque([(node, "")])
        while queue:
            state, text = queue.popleft()
            if nullable(state):
                found.append(text)
            if len(found) > limit or len(queue) > limit:
                return None
            for low, high in splits(state):
                following = self.derivative(state, low)
                if following != NOTHING and not self.is_empty(following):
                    if high - low >= limit:
                        return None
                    queue.extend((following, text + chr(code)) for code in range(low, high + 1))
        return found

    def derivative(self, node: Node, code: int) -> Node:
        """What may follow the character `code`."""
        key = (node, code)
        found = self._derivatives.get(key)
        if found is None:
            self._left -= 1
            if self._left < 0:
                raise GrammarError("a pattern takes too much work to decide", code="grammar_too_complex")
            found = self._derivatives[key] = self._derive(node, code)
        return found

    def _derive(self, node: Node, code: int) -> Node:
        match node:
            case Chars(ranges):
                return EMPTY if any(low <= code <= high for low, high in ranges) else NOTHING
            case Concat(parts):
                options = []
                for index, part in enumerate(parts):
                    options.append(concat([self.derivative(part, code), *parts[index + 1 :]]))
                    if not nullable(part):
                        break
                return union(options)
            case Union(options_):
                return union([self.derivative(option, code) for option in options_])
            case Both(parts_):
                return both([self.derivative(part, code) for part in parts_])
            case Not(inner):
                return negate(self.derivative(inner, code))
            case Repeat(inner, low, high):
                rest = repeat(inner, max(low - 1, 0), None if high is None else high - 1)
                return concat([self.derivative(inner, code), rest])
            case Anchor():
                raise ValueError("anchors are resolved before")


def nullable(node: Node) -> bool:
    """Is the empty text in the language?"""
    match node:
        case Chars() | Anchor():
            return False
        case Concat(parts):
            return all(nullable(part) for part in parts)
        case Union(options):
            return any(nullable(option) for option in options)
        case Both(parts):
            return all(nullable(part) for part in parts)
        case Not(inner):
            return not nullable(inner)
        case Repeat(inner, low, _):
            return low == 0 or nullable(inner)


def representatives(node: Node) -> list[int]:
    """One code point of each class of characters that the node's language can't tell apart."""
    return [low for low, _ in splits(node)]


def splits(node: Node) -> list[tuple[int, int]]:
    """All characters, in ranges that the node's language can't tell apart."""
    starts = {0, 0xE000}
    _collect_starts(node, starts)
    ordered = [start for start in sorted(starts) if not 0xD800 <= start <= 0xDFFF and start <= 0x10FFFF]
    ends = [*(start - 1 for start in ordered[1:]), 0x10FFFF]
    return [(low, 0xD7FF if low < 0xD800 <= high else high) for low, high in zip(ordered, ends, strict=True)]


def _collect_starts(node: Node, starts: set[int]) -> None:
    match node:
        case Chars(ranges):
            for low, high in ranges:
                starts |= {low, high + 1}
        case Concat(parts):
            for part in parts:
                _collect_starts(part, starts)
        case Union(nodes) | Both(nodes):
            for inner in nodes:
                _collect_starts(inner, starts)
        case Not(inner) | Repeat(inner, _, _):
            _collect_starts(inner, starts)
