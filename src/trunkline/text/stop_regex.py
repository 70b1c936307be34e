"""Regular expressions that end an output, found in text that arrives in pieces.

Position automata (Glushkov 1961), run for all places at once where a match may have begun: linear in the
text, whatever the pattern.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from trunkline.grammar.regex import Anchor, Both, Chars, Concat, Node, Not, Ranges, Repeat, Union, parse
from trunkline.types import RequestError

MAX_POSITIONS = 512  # of one pattern, its counted repetitions written out
MAX_EDGES = 16384  # between them


@dataclass(frozen=True)
class Program:
    """Positions are the characters of the pattern. A match begins at one of `first`, goes on along `follow`,
    and may end at one of `last`. `begin` finds the next character that one of `first` takes."""

    chars: tuple[Ranges, ...]
    first: tuple[int, ...]
    last: frozenset[int]
    follow: tuple[tuple[int, ...], ...]
    begin: re.Pattern[str]


class RegexMatcher:
    """Looks for the first end of a match; of the matches that end there, the longest counts."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._at = 0  # characters seen
        self._live: dict[int, int] = {}  # position -> where its match began, the earliest

    @property
    def held_from(self) -> int | None:
        """Where the earliest match began that may still come to an end."""
        return min(self._live.values(), default=None)

    def feed(self, text: str) -> tuple[int, int] | None:
        """(start, end) of the match, counted in characters from the first one fed, if it ends in `text`.
        Nothing may be fed after that."""
        program, offset, index = self._program, self._at, 0
        while index < len(text):
            if not self._live:
                found = program.begin.search(text, index)
                if found is None:
                    break
                index = found.start()
            start = self._step(ord(text[index]), offset + index)
            index += 1
            if start is not None:
                return start, offset + index
        self._at = offset + len(text)
        return None

    def _step(self, code: int, at: int) -> int | None:
        """Take one character. Where a match began that ends with it, if one does."""
        program, live = self._program, self._live
        after: dict[int, int] = {}
        for position, start in live.items():
            for following in program.follow[position]:
                if start < after.get(following, at) and _takes(program.chars[following], code):
                    after[following] = start
        for position in program.first:
            if position not in after and _takes(program.chars[position], code):
                after[position] = at
        self._live = after
        return min((start for position, start in after.items() if position in program.last), default=None)


def _takes(ranges: Ranges, code: int) -> bool:
    return any(low <= code <= high for low, high in ranges)


@lru_cache(maxsize=256)
def compile_stop(pattern: str) -> Program:
    """Raises RequestError for a pattern that is not regular, is too large, or matches the empty text."""
    builder = _Builder(pattern)
    nullable, first, last = builder.build(parse(pattern))
    if nullable or not first:
        what = (
            "matches the empty text, so it would end every output at once" if nullable else "matches no text"
        )
        raise _refusal(pattern, what)
    begins = "".join(
        f"\\U{low:08x}-\\U{high:08x}" for position in sorted(first) for low, high in builder.chars[position]
    )
    return Program(
        chars=tuple(builder.chars),
        first=tuple(sorted(first)),
        last=frozenset(last),
        follow=tuple(tuple(sorted(following)) for following in builder.follow),
        begin=re.compile(f"[{begins}]"),
    )


def _refusal(pattern: str, what: str) -> RequestError:
    return RequestError(f"stop_regex {pattern[:80]!r} {what}", code="invalid_regex", param="stop_regex")


class _Builder:
    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._edges = 0
        self.chars: list[Ranges] = []
        self.follow: list[set[int]] = []

    def build(self, node: Node) -> tuple[bool, set[int], set[int]]:
        """Whether it matches the empty text, and the positions that begin and that end a match of it."""
        match node:
            case Chars(ranges):
                return self._position(ranges)
            case Concat(parts):
                return self._sequence(list(parts))
            case Union(options):
                built = [self.build(option) for option in sorted(options, key=repr)]
                return (
                    any(nullable for nullable, _, _ in built),
                    set[int]().union(*(first for _, first, _ in built)),
                    set[int]().union(*(last for _, _, last in built)),
                )
            case Repeat(inner, low, high):
                return self._repeat(inner, low, high)
            case Anchor():
                raise _refusal(self._pattern, "has ^ or $: an output has no lines, and no end before it ends")
            case Both() | Not():
                raise _refusal(self._pattern, "is not supported")

    def _position(self, ranges: Ranges) -> tuple[bool, set[int], set[int]]:
        if not ranges:
            return False, set(), set()
        position = len(self.chars)
        if position >= MAX_POSITIONS:
            raise self._too_large()
        self.chars.append(ranges)
        self.follow.append(set())
        return False, {position}, {position}

    def _too_large(self) -> RequestError:
        return _refusal(
            self._pattern,
            f"is too large: with repetitions written out it may have {MAX_POSITIONS} characters",
        )

    def _link(self, ends: set[int], begins: set[int]) -> None:
        for position in ends:
            before = len(self.follow[position])
            self.follow[position] |= begins
            self._edges += len(self.follow[position]) - before
            if self._edges > MAX_EDGES:
                raise self._too_large()

    def _sequence(self, parts: list[Node]) -> tuple[bool, set[int], set[int]]:
        nullable, first, last = True, set[int](), set[int]()
        for part in parts:
            empty, begins, ends = self.build(part)
            self._link(last, begins)
            first |= begins if nullable else set()
            last = last | ends if empty else ends
            nullable = nullable and empty
        return nullable, first, last

    def _repeat(self, inner: Node, low: int, high: int | None) -> tuple[bool, set[int], set[int]]:
        if max(low, high or 0) > MAX_POSITIONS:
            raise self._too_large()
        copies: list[Node] = [inner] * low
        if high is None:
            nullable, first, last = self._sequence(copies)
            _, begins, ends = self.build(inner)
            self._link(ends, begins)
            self._link(last, begins)
            return nullable, first | (begins if nullable else set()), last | ends
        nullable, first, last = self._sequence(copies)
        for _ in range(high - low):  # each further copy may be the last one, or not be there
            empty, begins, ends = self.build(inner)
            self._link(last, begins)
            first |= begins if nullable else set()
            last |= ends
            nullable = nullable and (empty or low == 0)
        return nullable or low == 0, first, last
