"""Stop strings and stop regexes in a stream of text."""

from __future__ import annotations

from collections.abc import Sequence

from trunkline.text.stop_regex import RegexMatcher, compile_stop


class StopMatcher:
    """Finds the first stop in text that arrives in pieces, wherever the pieces are cut.

    First means: the one whose end comes first; of several that end there, the longest. Text that may turn out
    to be the start of a stop is held back, and nothing else is.
    """

    def __init__(
        self, stops: Sequence[str], patterns: Sequence[str] = (), *, keep_match: bool = False
    ) -> None:
        """`patterns`: regular expressions that `compile_stop` takes."""
        self._stops = tuple(stops)
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._longest = max(map(len, stops), default=0)
        self._patterns = tuple((pattern, RegexMatcher(compile_stop(pattern))) for pattern in patterns)
        self._keep_match = keep_match
        self._held = ""
        self._shown = 0  # characters before those that are held back
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Text that is safe to show. Once `matched` is set, it ended before (or with) the stop, and nothing
        may be fed any more."""
        if not (self._stops or self._patterns) or not text:
            return text
        new, text = text, self._held + text
        ends = [(at + len(stop), -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        for pattern, matcher in self._patterns:
            found = matcher.feed(new)
            if found is not None:
                start, end = found
                ends.append((end - self._shown, start - end, pattern))
        if ends:
            end, length, self.matched = min(ends)
            self._held = ""
            return text[: end if self._keep_match else end + length]
        cut = self._first_possible_start(text)
        self._held = text[cut:]
        self._shown += cut
        return text[:cut]

    def flush(self) -> str:
        """The stream is over: what was held back is text after all."""
        held, self._held = self._held, ""
        return held

    def _first_possible_start(self, text: str) -> int:
        begun = (matcher.held_from for _, matcher in self._patterns)
        first = min((at - self._shown for at in begun if at is not None), default=len(text))
        for start in range(max(0, len(text) - self._longest + 1), first):
            tail = text[start:]
            if tail[0] in self._first_chars and any(stop.startswith(tail) for stop in self._stops):
                return start
        return first
