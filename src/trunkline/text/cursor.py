"""A place in text that is still coming, for parsers written as if all of it were there.

A parser is a generator that yields where it needs more text than has come. It decides by the text alone,
never by the pieces in which it came, so that where the text is cut makes no difference (P4).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Waiting = Generator[None, None, T]  # yields: more text, please


class Cursor:
    """Reads forward. What was read is forgotten, but for what `hold` keeps for a parser that may find out
    that it was not what it looked like."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._held = -1  # where the text that is kept begins; -1: none
        self._over = False

    # ------------------------------------------------------------------ the writer's side
    def push(self, text: str) -> None:
        keep = self._at if self._held < 0 else self._held
        self._text = self._text[keep:] + text
        self._at -= keep
        self._held = min(self._held, 0)

    def end(self) -> None:
        """No more text comes."""
        self._over = True

    # ------------------------------------------------------------------ the parser's side
    def hold(self, begun: str = "") -> None:
        """Keep what is read from here on, and `begun`, which was read just before."""
        self._held = self._at - len(begun)

    def release(self) -> str:
        """What was read since `hold`, which is kept no longer."""
        text = self._text[self._held : self._at] if self._held >= 0 else ""
        self._held = -1
        return text

    def rest(self) -> str:
        """What has come and is not read yet."""
        return self._text[self._at :]

    def skip(self, count: int) -> None:
        self._at += count

    def peek(self, count: int) -> Waiting[str]:
        """The next `count` characters; fewer where the text ends."""
        while len(self._text) - self._at < count and not self._over:
            yield
        return self._text[self._at : self._at + count]

    def take(self, *marks: str) -> Waiting[str]:
        """Read the first of `marks` that stands here; "" if none does."""
        for mark in marks:
            size = 0
            while size < len(mark):  # no further than the text agrees
                size += 1
                if (yield from self.peek(size)) != mark[:size]:
                    break
            else:
                self._at += size
                return mark
        return ""

    def blanks(self) -> Waiting[str]:
        """Read white space. Returns the character behind it, which is not read; "" at the end."""
        while (char := (yield from self.peek(1))).isspace():
            self._at += 1
        return char

    def until(self, marks: Sequence[str], sink: Callable[[str], None], limit: int = 0) -> Waiting[str]:
        """Give text to `sink` up to the mark that comes first, and read that; of several that begin at one
        place, the longest. Returns it, or "" at the end of the text or after `limit` characters (0: none)."""
        passed = 0
        while True:
            rest = self.rest()
            found = [(at, -len(mark)) for mark in marks if (at := rest.find(mark)) >= 0]
            cut, size = min(found, default=(len(rest), 0))
            incomplete = -1 if self._over else _incomplete_mark(rest, marks, cut)
            if incomplete >= 0:
                cut, size = incomplete, 0
            if limit and passed + cut >= limit:
                sink(rest[: limit - passed])
                self._at += limit - passed
                return ""
            if cut:
                sink(rest[:cut])
                passed += cut
            self._at += cut - size
            if size or self._over:
                return rest[cut : cut - size]
            yield


def _incomplete_mark(text: str, marks: Sequence[str], before: int) -> int:
    """Where, at `before` or earlier, a mark may begin whose end has not come; -1: nowhere."""
    longest = max(map(len, marks), default=0)
    for at in range(max(0, len(text) - longest + 1), min(len(text), before + 1)):
        tail = text[at:]
        if any(len(mark) > len(tail) and mark.startswith(tail) for mark in marks):
            return at
    return -1
