"""Why a prompt missed: the cache's facts, against trees that are made to give each reason."""

from __future__ import annotations

import random

import pytest

from trunkline.cache import PrefixCache
from trunkline.types import CacheKey, Explain, PrefixMiss

KEY = CacheKey(salt="mine")
PAGE = 4


def fill(cache: PrefixCache, tokens: list[int], key: CacheKey = KEY) -> None:
    """Compute and publish `tokens`, then let go of them."""
    lease = cache.acquire(key, tokens, len(tokens) - 1)
    assert cache.grow(lease, len(tokens))
    cache.publish(lease, tokens, len(tokens))
    cache.release(lease)


def miss(
    cache: PrefixCache,
    tokens: list[int],
    key: CacheKey = KEY,
    limit: int | None = None,
    how: Explain = "tokens",
) -> PrefixMiss:
    limit = len(tokens) - 1 if limit is None else limit
    lease = cache.acquire(key, tokens, limit)
    report = cache.explain(lease, tokens, limit, how)
    cache.release(lease)
    cache.check()
    return report


@pytest.fixture
def cache() -> PrefixCache:
    return PrefixCache(num_pages=16, page_size=PAGE)


def test_nothing_is_cached(cache: PrefixCache) -> None:
    report = miss(cache, list(range(9)))
    assert (report.reason, report.matched, report.position, report.missed) == ("empty", 0, 0, 8)
    assert report.wanted == tuple(range(9)) and report.found == ()


def test_other_tokens_inside_of_a_page(cache: PrefixCache) -> None:
    fill(cache, list(range(12)))
    report = miss(cache, [0, 1, 2, 3, 4, 5, 99, 7, 8, 9])
    assert (report.reason, report.matched, report.position, report.branches) == ("other_tokens", 4, 6, 1)
    assert report.wanted == (99, 7, 8, 9)
    assert report.found == (6, 7, 8, 9, 10, 11)
    assert report.missed == 4  # positions 4 to 7; the last token but one ends no page


def test_the_nearest_of_several_branches(cache: PrefixCache) -> None:
    fill(cache, [0, 1, 2, 3, 4, 5, 6, 7])
    fill(cache, [0, 1, 2, 3, 4, 5, 60, 70])
    fill(cache, [0, 1, 2, 3, 40, 50, 60, 70])
    report = miss(cache, [0, 1, 2, 3, 4, 5, 60, 71, 8])
    assert (report.position, report.branches, report.found[:1]) == (7, 3, (70,))


def test_the_trees_tokens_are_shown_only_on_demand(cache: PrefixCache) -> None:
    fill(cache, list(range(12)))
    report = miss(cache, [0, 1, 2, 3, 4, 5, 99, 7, 8], how="counts")
    assert (report.reason, report.position, report.found) == ("other_tokens", 6, ())


def test_the_end_of_a_branch(cache: PrefixCache) -> None:
    fill(cache, list(range(8)))
    report = miss(cache, list(range(16)))
    assert (report.reason, report.matched, report.missed) == ("end_of_branch", 8, 4)


def test_too_short_for_a_page_and_whole_prompts(cache: PrefixCache) -> None:
    fill(cache, list(range(16)))
    assert miss(cache, [0, 1, 2]).reason == "page_tail"
    assert miss(cache, list(range(8))).reason == "page_tail"  # the last token is always computed
    assert miss(cache, list(range(9))).reason == "whole_prompt"


def test_prompt_log_probabilities(cache: PrefixCache) -> None:
    fill(cache, list(range(16)))
    report = miss(cache, list(range(16)), limit=5)
    assert (report.reason, report.matched) == ("prompt_logprobs", 4)


def test_evicted_and_flushed(cache: PrefixCache) -> None:
    fill(cache, list(range(64)))
    fill(cache, [7] * 40)  # takes pages from the end of the first
    report = miss(cache, list(range(64)))
    assert report.reason == "evicted" and 0 < report.matched < 60
    cache.flush()
    assert miss(cache, list(range(64))).reason == "flushed"
    assert miss(cache, [5] * 9).reason == "empty"  # this was never there


def test_a_page_that_comes_back_is_no_loss(cache: PrefixCache) -> None:
    fill(cache, list(range(8)))
    cache.flush()
    fill(cache, list(range(8)))
    assert miss(cache, list(range(9))).reason == "whole_prompt"
    assert miss(cache, list(range(13))).reason == "end_of_branch"


def test_the_cache_is_off() -> None:
    report = miss(PrefixCache(16, PAGE, enabled=False), list(range(9)))
    assert report.reason == "disabled"


def test_other_namespaces_but_never_another_tenants(cache: PrefixCache) -> None:
    shared, new, foreign = CacheKey(), CacheKey(salt="mine", weight_version="2"), CacheKey(salt="theirs")
    for key in (shared, new, foreign):
        fill(cache, list(range(12)), key)
    report = miss(cache, list(range(13)))
    assert [(one.salted, one.weight_version, one.matched) for one in report.elsewhere] == [
        (False, "default", 12),
        (True, "2", 12),
    ]
    assert miss(cache, list(range(13)), shared).reason == "whole_prompt"
    cache.flush()
    fill(cache, list(range(12)), foreign)
    assert miss(cache, list(range(13))).elsewhere == ()
    assert miss(cache, list(range(13)), shared).elsewhere == ()


def test_reports_agree_with_a_plain_list_of_prompts() -> None:
    """Against the definition: the longest prefix in whole pages that any earlier prompt has."""
    rng = random.Random(3)
    cache = PrefixCache(num_pages=4096, page_size=PAGE)
    seen: list[list[int]] = []
    for _ in range(300):
        tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 40))]
        report = miss(cache, tokens)
        known = max((common(tokens, other) // PAGE * PAGE for other in seen), default=0)
        assert report.matched == min(known, (len(tokens) - 1) // PAGE * PAGE)
        assert report.wanted == tuple(tokens[report.position : report.position + 16])
        if report.reason == "other_tokens":
            near = max(common(tokens, other[: len(other) // PAGE * PAGE]) for other in seen)
            assert report.position == near and report.found[0] != report.wanted[0]
        fill(cache, tokens)
        seen.append(tokens)


def common(one: list[int], other: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
