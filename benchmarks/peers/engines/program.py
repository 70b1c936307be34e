"""What the engines' programs share: a job in, an outcome out, and a record of when tokens came."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace

from benchmarks.peers.workloads import Job, Outcome


def answer(run: Callable[[Job], Outcome]) -> None:
    """Read a job from standard input, run it, print the outcome as the last line."""
    outcome = run(Job(**json.load(sys.stdin)))
    if not outcome.peak_rss_bytes:
        usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        outcome = replace(outcome, peak_rss_bytes=1024 * max(usage.ru_maxrss for usage in usages))
    print("\n" + json.dumps(asdict(outcome)), flush=True)


class Timeline:
    """Counts of generated tokens, from the moment it is made."""

    def __init__(self, requests: int) -> None:
        self.tokens = [0] * requests
        self._first = [0.0] * requests
        self._last = 0.0
        self._start = time.monotonic()

    def note(self, request: int, tokens: int) -> None:
        """`tokens` more of one request have just come."""
        self._last = time.monotonic()
        if not self.tokens[request]:
            self._first[request] = self._last
        self.tokens[request] += tokens

    def outcome(self, version: str, kv_bytes: int, first_token_at: float | None) -> Outcome:
        """`first_token_at`: of the warm-up; None if there was none."""
        return Outcome(
            version=version,
            tokens=self.tokens,
            first_s=max(self._first) - self._start,
            total_s=self._last - self._start,
            kv_bytes=kv_bytes,
            first_token_at=min(self._first) if first_token_at is None else first_token_at,
        )
