"""How fast requests end, to tell refused clients when to come back."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

MEMORY = 256  # ends that are looked at
WINDOW = 30.0  # seconds for which an end counts
SHORTEST, LONGEST = 1, 60  # seconds told to clients


class DrainRate:
    """The rate at which completions have ended lately."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=MEMORY)

    def ended(self) -> None:
        self._ends.append(self._clock())

    def seconds(self, completions: int) -> int:
        """Whole seconds in which so many end at this rate; SHORTEST while it is not known."""
        now = self._clock()
        while self._ends and now - self._ends[0] > WINDOW:
            self._ends.popleft()
        if len(self._ends) < 2:
            return SHORTEST
        rate = len(self._ends) / max(now - self._ends[0], 1e-3)
        return min(max(math.ceil(completions / rate), SHORTEST), LONGEST)
