"""Stop strings in a stream of text."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Finds the first stop string in text that arrives in pieces, wherever the pieces are cut.

    First means: the one whose end comes first; of several that end there, the longest. Text that may turn out
    to be the start of a stop string is held back, and nothing else is.
    """

    def __init__(self, stops: Sequence[str], *, keep_match: bool = False) -> None:
        self._stops = tuple(stops)
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._longest = max(map(len, stops), default=0)
        self._keep_match = keep_match
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Text that is safe to show. Once `matched` is set, it ended before (or with) the stop string, and
        nothing may be fed any more."""
        if not self._stops or not text:
            return text
        text = self._held + text
        ends = [(at + len(stop), -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            end, _, self.matched = min(ends)
            self._held = ""
            return text[: end if self._keep_match else end - len(self.matched)]
        cut = self._first_possible_start(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """The stream is over: what was held back is text after all."""
        held, self._held = self._held, ""
        return held

    def _first_possible_start(self, text: str) -> int:
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            tail = text[start:]
            if tail[0] in self._first_chars and any(stop.startswith(tail) for stop in self._stops):
                return start
        return len(text)
