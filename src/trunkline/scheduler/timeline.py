"""When things happened to one request, as the core saw it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from trunkline.types import Timing


@dataclass(slots=True)
class Timeline:
    """Times are seconds on the monotonic clock. Steps are followed only for requests that are `traced`."""

    arrived: float
    traced: bool
    ready: float = 0.0
    admitted: float | None = None
    _started: deque[tuple[float, int]] = field(default_factory=deque)  # steps in flight: start, tokens
    _chunks: list[tuple[float, float, int]] = field(default_factory=list)

    def compiled(self, now: float) -> None:
        """Its grammar is there."""
        self.ready = now

    def admit(self, now: float) -> None:
        """It got a row. Only the first time counts."""
        if self.admitted is None:
            self.admitted = now

    def launch(self, now: float, num_tokens: int) -> None:
        """A step with `num_tokens` of its tokens begins."""
        if self.traced:
            self._started.append((now, num_tokens))

    def end(self, now: float, first_output: bool) -> None:
        """Its oldest step in flight has ended; steps up to the one with its first token are kept."""
        if self._started:
            start, num_tokens = self._started.popleft()
            self._chunks.append((start, now, num_tokens))
            self.traced = not first_output

    def leave(self) -> None:
        """It gave up its row: results of its steps in flight will be dropped."""
        self._started.clear()

    def timing(self, now: float) -> Timing:
        """Up to the first output, which is made `now`."""
        admitted = now if self.admitted is None else self.admitted
        return Timing(self.arrived, max(self.arrived, self.ready), admitted, now, self._chunks)
