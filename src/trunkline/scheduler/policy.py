"""Order of admission, order within a step, and how much room running requests are expected to need."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from trunkline.config.schema import Policy
from trunkline.scheduler.request import Request

LPM_MAX_WAITING = 128  # beyond this, matching every waiting prompt costs more than the order gains
MAX_BYPASSED = 64  # later arrivals admitted ahead of a request before it comes first, whatever the policy


def admission_order(
    waiting: Sequence[Request], policy: Policy, hit_tokens: Callable[[Request], int]
) -> Sequence[Request]:
    """Waiting requests in the order in which admission tries them.

    `waiting` is sorted by priority, then arrival. `lpm` prefers the longest cached prefix (SGLang's
    longest-prefix-match). A request that was bypassed too often comes first: no policy starves anybody.
    """
    lpm = policy == "lpm" and 1 < len(waiting) <= LPM_MAX_WAITING
    if not lpm and not any(request.bypassed >= MAX_BYPASSED for request in waiting):
        return waiting

    def rank(request: Request) -> tuple[bool, int, int]:
        overdue = request.bypassed >= MAX_BYPASSED
        return not overdue, -request.urgency, 0 if overdue or not lpm else -hit_tokens(request)

    return sorted(waiting, key=rank)


def victim(running: Sequence[Request], below: int | None, spared: Collection[Request]) -> Request | None:
    """Who gives up its place for a request of urgency `below`: the last admitted of the least urgent. None if
    nobody is so much less urgent; who was bypassed too often keeps its place (None: who if somebody must).
    """
    found: Request | None = None
    for request in running:
        if below is not None and (
            request.urgency >= below or request.bypassed >= MAX_BYPASSED or request in spared
        ):
            continue
        if found is None or request.urgency <= found.urgency:
            found = request
    return found


def step_order(running: Iterable[Request]) -> list[Request]:
    """Rows that need one token go before prompt chunks: a long prompt holds up nobody's next token."""
    return sorted(running, key=lambda request: request.base > 1)


class GrowthEstimate:
    """Share of their remaining `max_new_tokens` that running requests are expected to use.

    Most requests stop early, so reserving all of it wastes the pool; reserving nothing preempts too often.
    The share falls step by step while nothing is preempted, and is set from what running requests really used
    when something is. Method and constants are SGLang's `new_token_ratio`.
    """

    INITIAL, FLOOR, STEPS, HORIZON, CLIP = 0.7, 0.14, 600, 20, 4096

    def __init__(self, conservativeness: float) -> None:
        self._initial = min(1.0, self.INITIAL * conservativeness)
        self._floor = self._initial * self.FLOOR
        self._decay = (self._initial - self._floor) / self.STEPS
        self.ratio = self._initial

    def tokens(self, request: Request) -> int:
        """Output tokens that `request` is expected to add, pending ones included."""
        return int(min(request.max_tokens - len(request.tokens), self.CLIP) * self.ratio)

    def stepped(self) -> None:
        self.ratio = max(self._floor, self.ratio - self._decay)

    def preempted(self, running: Sequence[Request]) -> None:
        used = sum(request.num_output + self.HORIZON for request in running)
        asked = sum(request.max_tokens - request.prompt_len for request in running)
        self.ratio = min(1.0, max(self.ratio, used / max(1, asked)))

    def idle(self) -> None:
        self.ratio = self._initial
