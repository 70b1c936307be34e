"""The last steps of the engine, kept while somebody watches."""

from __future__ import annotations

import time
from collections import deque

from trunkline.messages import StepRecord
from trunkline.scheduler.plan import StepPlan

KEPT = 240  # steps
WATCH_TIME = 10.0  # seconds after the last look for which steps are recorded


class StepLog:
    """Costs one comparison per step while nobody looks."""

    def __init__(self) -> None:
        self._until = 0.0  # 0: nobody watches
        self._steps: deque[StepRecord] = deque(maxlen=KEPT)

    def watch(self) -> None:
        self._until = time.monotonic() + WATCH_TIME

    def record(self, plan: StepPlan, started: float) -> None:
        """Note a step that began at `started` (seconds of `time.monotonic`) and has just ended."""
        if self._until == 0.0 or not plan.rows:
            return
        now = time.monotonic()
        if now > self._until:
            self._until = 0.0
            self._steps.clear()
            return
        prompt = sum(row.q_len for row in plan.rows if row.q_len - row.num_drafts > 1)
        decode = plan.num_tokens - prompt
        self._steps.append(StepRecord(plan.step, now, now - started, prompt, decode, len(plan.rows)))

    def records(self) -> list[StepRecord]:
        """Oldest first."""
        return list(self._steps)
