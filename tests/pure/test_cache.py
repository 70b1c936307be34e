"""The radix tree and its pages."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest

from trunkline.cache import Lease, PrefixCache
from trunkline.types import CacheKey, SessionTurn

KEY = CacheKey()


def leased(cache: PrefixCache, tokens: list[int], key: CacheKey = KEY) -> Lease:
    lease = cache.acquire(key, tokens, len(tokens) - 1)
    assert cache.grow(lease, len(tokens))
    return lease


def finish(cache: PrefixCache, lease: Lease, tokens: list[int]) -> None:
    cache.publish(lease, tokens, len(tokens) - 1)
    cache.release(lease)
    cache.check()


def test_a_published_prefix_is_found_in_whole_pages() -> None:
    cache = PrefixCache(16, page_size=4)
    tokens = list(range(11))
    finish(cache, leased(cache, tokens), tokens)
    assert cache.match_length(KEY, tokens, 10) == 8
    assert cache.match_length(KEY, tokens[:7] + [99] * 4, 10) == 4
    assert cache.match_length(KEY, [99, *tokens], 10) == 0


def test_a_hit_never_covers_the_last_token() -> None:
    cache = PrefixCache(16, page_size=4)
    tokens = list(range(9))
    finish(cache, leased(cache, tokens), tokens)
    again = cache.acquire(KEY, tokens[:8], 7)
    assert len(again.pages) == 1


def test_keys_never_share() -> None:
    cache = PrefixCache(16, page_size=1)
    tokens = list(range(6))
    finish(cache, leased(cache, tokens), tokens)
    for other in (CacheKey(salt="x"), CacheKey(adapter="x"), CacheKey(weight_version="x")):
        assert cache.match_length(other, tokens, 5) == 0


def test_publishing_what_the_tree_has_swaps_the_copy_for_the_trees_pages() -> None:
    cache = PrefixCache(16, page_size=2)
    tokens = list(range(7))
    first, second = leased(cache, tokens), leased(cache, tokens)
    assert cache.publish(first, tokens, 6) is None
    free = cache.free_pages
    swap = cache.publish(second, tokens, 6)
    assert swap is not None and (swap.start, swap.pages) == (0, first.pages[:3])
    assert second.pages[:3] == first.pages[:3]
    assert cache.free_pages == free + 3
    cache.check()


def test_a_held_prefix_is_not_evicted_and_the_oldest_leaf_goes_first() -> None:
    cache = PrefixCache(8, page_size=1)
    old, new = [1, 2, 3], [5, 6, 7]
    for tokens in (old, new):
        finish(cache, leased(cache, tokens), tokens)
    held = cache.acquire(KEY, [*new, 0], 3)
    assert cache.available_pages == 6
    wide = cache.acquire(KEY, [9] * 7, 0)
    assert not cache.grow(wide, 7)
    assert cache.grow(wide, 6)
    cache.check()
    assert cache.match_length(KEY, [*old, 0], 3) == 0
    assert cache.match_length(KEY, [*new, 0], 3) == 2
    cache.release(held)


def test_the_end_of_a_long_edge_is_evicted_before_its_start() -> None:
    cache = PrefixCache(8, page_size=1)
    tokens = list(range(9))
    finish(cache, leased(cache, tokens[:8]), tokens[:8])
    other = cache.acquire(KEY, [99] * 4, 0)
    assert cache.grow(other, 3)
    cache.check()
    assert cache.match_length(KEY, tokens, 8) == 5


def test_a_disabled_cache_shares_nothing() -> None:
    cache = PrefixCache(8, page_size=1, enabled=False)
    tokens = [1, 2, 3, 4]
    finish(cache, leased(cache, tokens), tokens)
    assert cache.match_length(KEY, tokens, 3) == 0
    assert cache.free_pages == 8


def test_the_next_turn_looks_on_where_the_last_one_ended() -> None:
    cache = PrefixCache(40, page_size=2)
    seen = Counted(range(100))
    first = leased(cache, list(range(20)))
    cache.publish(first, list(range(20)), 20)
    cache.keep(SessionTurn("s", 1), first)
    cache.release(first)
    for turn, compared in ((SessionTurn("s", 2, 1, 20), range(20, 22)), (SessionTurn("s", 2), range(20))):
        seen.at.clear()
        assert cache.match_length(KEY, seen, 30, turn) == 20
        assert seen.at and min(seen.at) == compared[0] and max(seen.at) < 22
    assert cache.match_length(CacheKey(salt="else"), seen, 30, SessionTurn("s", 2, 1, 20)) == 0
    assert cache.match_length(KEY, [*range(18), 90, 91], 20, SessionTurn("s", 2, 1, 18)) == 18  # cut off
    branch = [*range(10), 70, 71, 72]  # cuts the edge: the turn ends where it did
    lease = leased(cache, branch)
    cache.publish(lease, branch, 12)
    seen.at.clear()
    assert cache.match_length(KEY, seen, 30, SessionTurn("s", 2, 1, 20)) == 20 and min(seen.at) == 20
    cache.release(lease)
    again = cache.acquire(KEY, list(range(30)), 29, SessionTurn("s", 2, 1, 20))
    assert again.num_shared == 10
    cache.check()
    assert cache.grow(again, 30)
    cache.publish(again, list(range(30)), 26)  # lengthens the edge: the end has moved
    cache.keep(SessionTurn("s", 2, 1, 20), again)
    seen.at.clear()
    assert cache.match_length(KEY, seen, 30, SessionTurn("s", 3, 1, 20)) == 26 and min(seen.at) == 0
    seen.at.clear()
    assert cache.match_length(KEY, seen, 30, SessionTurn("s", 3, 2, 26)) == 26 and min(seen.at) == 26
    cache.release(again)
    cache.flush()
    cache.check()
    assert cache.match_length(KEY, seen, 30, SessionTurn("s", 3, 2, 26)) == 0


class Counted(list[int]):
    """Tokens that note where they were looked at."""

    def __init__(self, tokens: Iterable[int]) -> None:
        super().__init__(tokens)
        self.at: list[int] = []

    def __getitem__(self, at: Any) -> Any:
        self.at += range(*at.indices(len(self))) if isinstance(at, slice) else [at]
        return super().__getitem__(at)


@pytest.mark.parametrize("seed", range(60))
def test_pages_are_conserved_whatever_happens(seed: int) -> None:
    """Random acquire, grow, publish, release and flush; a model of what was published predicts the hits."""
    rng = random.Random(seed)
    size = rng.choice([1, 2, 4])
    cache = PrefixCache(rng.choice([12, 40, 400]), size)
    keys = [CacheKey(salt=salt) for salt in "ab"]
    held: list[tuple[Lease, list[int]]] = []
    published: set[tuple[CacheKey, tuple[int, ...]]] = set()
    for _ in range(150):
        action = rng.random()
        if action < 0.4:
            tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 24))]
            key = rng.choice(keys)
            lease = cache.acquire(key, tokens, len(tokens) - 1)
            hit = len(lease.pages) * size
            assert hit <= len(tokens) - 1
            assert hit == 0 or (key, tuple(tokens[:hit])) in published, "a hit on what nobody published"
            if cache.grow(lease, len(tokens)):
                held.append((lease, tokens))
            else:
                cache.release(lease)
        elif held and action < 0.75:
            lease, tokens = rng.choice(held)
            count = rng.randrange(len(tokens) + 1)
            before = list(lease.pages)
            swap = cache.publish(lease, tokens, count)
            changed = [i for i, page in enumerate(lease.pages) if page != before[i]]
            assert not changed or (swap is not None and changed[0] >= swap.start)
            for end in range(size, count + 1, size):
                published.add((lease.key, tuple(tokens[:end])))
                assert cache.match_length(lease.key, tokens, end) == end
        elif held and action < 0.97:
            lease, _ = held.pop(rng.randrange(len(held)))
            cache.release(lease)
        else:
            cache.flush()
        cache.check()
    for lease, _ in held:
        cache.release(lease)
    cache.flush()
    cache.check()
    assert cache.free_pages == cache.num_pages


def test_an_outline_is_bounded_and_begins_with_what_is_held() -> None:
    cache = PrefixCache(400, page_size=2)
    trunk = [1, 2, 3, 4]
    for i in range(60):
        tokens = [*trunk, 100 + i, 5, 6]
        finish(cache, leased(cache, tokens), tokens)
    held = [*trunk, 100, 5, 6]  # the oldest leaf of all
    lease = leased(cache, held)
    whole = cache.outline(1000, 3)
    assert len(whole) == cache.num_edges + 1 and not any(edge.hidden for edge in whole)
    assert sum(edge.tokens for edge in whole) == 2 * (cache.num_pages - cache.free_pages - 1)
    few = cache.outline(10, 3)
    assert len(few) == 10 and few[0].parent == 0 and few[1].head == [1, 2, 3]
    numbers = [edge.number for edge in few]
    assert len(set(numbers)) == 10 and all(edge.parent in numbers[:at] for at, edge in enumerate(few) if at)
    assert few[2].head == [100, 5] and few[2].locks == 1, "the held leaf comes first"
    assert few[1].hidden == 60 - 8
    assert {edge.head[0] for edge in few[3:]} == set(range(153, 160)), "then those used last"
    sizes = [len(cache.outline(most, 3)) for most in range(4)]
    assert sizes == [0, 1, 2, 3], "a path that does not fit as a whole is left out"
    cache.release(lease)


def test_pages_of_sessions_are_evicted_last_and_like_others_when_the_session_has_ended() -> None:
    cache = PrefixCache(8, page_size=2)
    for start, session in ((0, "a"), (10, ""), (20, "b")):
        tokens = list(range(start, start + 5))
        lease = leased(cache, tokens)
        cache.publish(lease, tokens, 4)
        if session:
            cache.keep(SessionTurn(session, 1), lease)
        cache.release(lease)
        cache.check()

    def cached() -> list[int]:
        return [cache.match_length(KEY, list(range(start, start + 5)), 4) for start in (0, 10, 20)]

    assert cached() == [4, 4, 4] and cache.available_pages == 8  # a tag takes no room from anybody
    first = leased(cache, [90] * 8)  # the oldest, "a", stays
    assert cached() == [4, 0, 4]
    cache.end_session("b")
    cache.end_session("nobody")
    cache.check()
    second = leased(cache, [91] * 4)
    assert cached() == [4, 0, 0]
    third = leased(cache, [92] * 4)  # nothing else is left
    assert cached() == [0, 0, 0] and cache.free_pages == 0
    for lease in (first, second, third):
        cache.release(lease)
    cache.end_session("a")
    cache.check()
