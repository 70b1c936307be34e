"""Property tests (P8): pages are conserved and every request ends, whatever the order of calls.

Hypothesis chooses the calls and shrinks what fails; the random cases of `tests.sim` go for volume instead.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from tests.sim.cases import Case, Submission
from tests.sim.runner import Simulation, shared_pages
from trunkline.cache import Lease, PrefixCache
from trunkline.config.schema import SchedulerConfig
from trunkline.messages import AddRequest
from trunkline.types import CacheKey, SamplingParams, SessionTurn

KEYS = st.sampled_from((CacheKey(), CacheKey(salt="s")))
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)  # two symbols: prefixes meet often

Content = tuple[CacheKey, tuple[int, ...]]  # what a page must hold: its whole prefix, under its key


class CacheMachine(RuleBasedStateMachine):
    """The cache against a model that knows what every page was last filled with."""

    leases = Bundle("leases")

    @initialize(num_pages=st.integers(1, 12), page_size=st.integers(1, 4), enabled=st.booleans())
    def start(self, num_pages: int, page_size: int, enabled: bool) -> None:
        self.cache = PrefixCache(num_pages, page_size, enabled=enabled)
        self.content: dict[int, Content] = {}
        self.held: dict[Lease, tuple[CacheKey, list[int]]] = {}
        self.turns: list[tuple[CacheKey, list[int]]] = [(CacheKey(), [])]  # turn 0 has no end

    def _prefix(self, key: CacheKey, tokens: list[int], page: int) -> Content:
        return key, tuple(tokens[: (page + 1) * self.cache.page_size])

    @rule(target=leases, key=KEYS, tokens=TOKENS, follows=st.integers(0, 9), kept=st.integers(0, 14))
    def acquire(self, key: CacheKey, tokens: list[int], follows: int, kept: int) -> Lease:
        """Perhaps as a turn of a session, which goes on from a part of an earlier one's tokens."""
        follows %= len(self.turns)
        before = self.turns[follows]
        turn = SessionTurn("s", len(self.turns), follows, min(kept, len(before[1])))
        tokens = before[1][: turn.kept] + tokens
        size, limit = self.cache.page_size, len(tokens) - 1
        cached = {self.content[page] for page in shared_pages(self.cache)}
        longest = 0
        while (longest + 1) * size <= limit and self._prefix(key, tokens, longest) in cached:
            longest += 1
        assert self.cache.match_length(key, tokens, limit, turn) == longest * size
        lease = self.cache.acquire(key, tokens, limit, turn)
        assert lease.num_shared == len(lease.pages) == longest
        self.held[lease] = key, list(tokens)
        return lease

    @rule(lease=leases)
    def keep(self, lease: Lease) -> None:
        if len(self.turns) < 10:
            self.cache.keep(SessionTurn("s", len(self.turns)), lease)
            key, tokens = self.held[lease]
            self.turns.append((key, list(tokens)))

    @rule()
    def end_session(self) -> None:
        self.cache.end_session("s")

    @rule(lease=leases, extra=st.integers(0, 6))
    def grow(self, lease: Lease, extra: int) -> None:
        """Allocate, compute, and put out a few more tokens."""
        key, tokens = self.held[lease]
        free, need = self.cache.available_pages, self.cache.pages_for(len(tokens) + extra) - len(lease.pages)
        before = list(lease.pages)
        assert self.cache.grow(lease, len(tokens) + extra) == (need <= free)
        if need > free:
            assert lease.pages == before
            return
        tokens += [2] * extra
        for index in range(len(before), len(lease.pages)):
            self.content[lease.pages[index]] = self._prefix(key, tokens, index)
        for index in range(lease.num_shared, len(lease.pages)):
            self.content[lease.pages[index]] = self._prefix(key, tokens, index)

    @rule(lease=leases, part=st.integers(0, 20))
    def publish(self, lease: Lease, part: int) -> None:
        _, tokens = self.held[lease]
        full = min(part, len(lease.pages) * self.cache.page_size, len(tokens))
        before = list(lease.pages)
        swap = self.cache.publish(lease, tokens, full)
        if swap is not None:
            assert lease.pages[swap.start : swap.start + len(swap.pages)] == swap.pages
            before[swap.start : swap.start + len(swap.pages)] = swap.pages
        assert lease.pages == before
        if self.cache.enabled:
            assert lease.num_shared >= full // self.cache.page_size

    @rule(lease=consumes(leases))
    def release(self, lease: Lease) -> None:
        self.cache.release(lease)
        del self.held[lease]

    @rule()
    def flush(self) -> None:
        evictable = self.cache.evictable_pages
        assert self.cache.flush() == evictable * self.cache.page_size
        assert self.cache.evictable_pages == 0

    @invariant()
    def owners_and_contents(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check()
        own = sum(len(lease.pages) - lease.num_shared for lease in self.held)
        assert self.cache.free_pages + own + len(shared_pages(self.cache)) == self.cache.num_pages
        for lease, (key, tokens) in self.held.items():
            for index, page in enumerate(lease.pages):
                assert self.content[page] == self._prefix(key, tokens, index), "a page holds another prefix"

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            for lease in self.held:
                self.cache.release(lease)
            self.cache.flush()
            assert self.cache.free_pages == self.cache.num_pages


class EngineMachine(RuleBasedStateMachine):
    """Scheduler, cache and loop under calls in any order; outputs are checked by the simulation itself."""

    rids = Bundle("rids")

    @initialize(
        page_size=st.integers(1, 4),
        num_pages=st.integers(6, 30),
        step_tokens=st.integers(3, 12),
        depth=st.integers(0, 2),
        num_drafts=st.integers(0, 2),
        mix=st.sampled_from(("always", "never")),
        policy=st.sampled_from(("fcfs", "lpm")),
        wait=st.booleans(),
    )
    def start(
        self,
        page_size: int,
        num_pages: int,
        step_tokens: int,
        depth: int,
        num_drafts: int,
        mix: str,
        policy: str,
        wait: bool,
    ) -> None:
        config = SchedulerConfig(
            max_running=3,
            step_tokens=step_tokens,
            max_context=24,
            mix=mix,  # type: ignore[arg-type]
            policy=policy,  # type: ignore[arg-type]
            conservativeness=0.0,
            depth=depth,
            prefill_wait=wait,
        )
        self.simulation = Simulation(Case(-1, config, num_pages, page_size, True, num_drafts, False, []))
        self.sent: dict[str, Submission] = {}

    @rule(target=rids, key=KEYS, tokens=TOKENS, limit=st.integers(0, 9), received=st.integers(0, 3))
    def submit(self, key: CacheKey, tokens: list[int], limit: int, received: int) -> str:
        rid = f"r{len(self.sent)}"
        params = SamplingParams(max_new_tokens=limit)
        message = AddRequest(rid=rid, token_ids=tokens, params=params, cache_key=key)
        self.sent[rid] = Submission(message, at=0, received=min(received, len(tokens) - 1))
        self.simulation.submit(self.sent[rid], message)
        return rid

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(count):
            if self.simulation.core.has_work:
                self.simulation.step()

    @rule(rid=rids)
    def abort(self, rid: str) -> None:
        self.simulation.abort(self.sent[rid])

    @rule()
    def flush(self) -> None:
        self.simulation.flush()

    @invariant()
    def conserved(self) -> None:
        if not hasattr(self, "simulation"):
            return
        cache = self.simulation.cache
        own = sum(len(lease.pages) - lease.num_shared for lease in cache._leases)
        assert cache.free_pages + own + len(shared_pages(cache)) == cache.num_pages
        assert not self.simulation.live or self.simulation.core.has_work

    def teardown(self) -> None:
        if not hasattr(self, "simulation"):
            return
        for _ in range(40 * (len(self.sent) + 1)):
            if not self.simulation.core.has_work:
                break
            self.simulation.step()
        self.simulation.finish()


COMMON = settings(deadline=None, derandomize=True, stateful_step_count=25)
TestCache = CacheMachine.TestCase
TestCache.settings = settings(COMMON, max_examples=120)
TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(COMMON, max_examples=60)
