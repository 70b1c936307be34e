"""Guides: masks and tokens of one constrained output, against brute force."""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np
import pytest

from tests.sim.grammar import BREAKS, ToyMatcher, choices
from tests.sim.toy_lm import EOS_IDS, NUM_SAMPLED, VOCAB_SIZE
from trunkline.grammar.protocol import GrammarError
from trunkline.messages import AddRequest
from trunkline.scheduler.guide import Guide, failure
from trunkline.types import GrammarSpec, SamplingParams, Thinking

WORDS = 2


def allowed_by(guide: Guide, banned: frozenset[int] = frozenset()) -> frozenset[int]:
    row = np.full(WORDS, 7, np.int32)
    guide.fill_mask(row, banned)
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")
    return frozenset(np.flatnonzero(bits).tolist())


def message(source: str | None, thinking: Thinking | None, minimum: int = 0) -> AddRequest:
    return AddRequest(
        rid="a",
        token_ids=[1],
        params=SamplingParams(min_new_tokens=minimum),
        grammar=None if source is None else GrammarSpec("regex", source),
        thinking=thinking,
    )


def guide_of(request: AddRequest) -> Guide:
    matcher = None if request.grammar is None else ToyMatcher(request.grammar.source, Counter())
    return Guide(matcher, EOS_IDS, request.thinking)


@pytest.mark.parametrize("end", [(2,), (2, 2), (2, 3), (2, 2, 3), (2, 3, 2, 4), (2, 3, 2, 3, 5)])
@pytest.mark.parametrize("most", [None, 0, 1, 4])
@pytest.mark.parametrize("source", [None, "a"])
def test_reasoning_ends_where_brute_force_finds_its_end(
    end: tuple[int, ...], most: int | None, source: str | None
) -> None:
    rng = Random(hash((end, most)))
    for _ in range(60):
        request = message(source, Thinking(end, most))
        guide, out = guide_of(request), []
        for _ in range(24):
            want = choices(request, out)
            got = allowed_by(guide)
            if want is None or len(want) > NUM_SAMPLED - 3:  # everything, perhaps but an end
                assert len(got) >= VOCAB_SIZE - 2 and (not got & set(EOS_IDS)) == (want is not None)
                token = rng.choice((2, 2, 3, 3, 4, 5))
            else:
                assert got == want
                token = rng.choice(sorted(want))
            if token in EOS_IDS:
                break
            assert guide.follow([token]) is None
            out.append(token)


def test_reasoning_has_no_forced_tokens_and_what_follows_has() -> None:
    request = message("d", Thinking((5,)))
    matcher = ToyMatcher("d", Counter())
    while not matcher.forced():
        row = np.zeros(WORDS, np.int32)
        matcher.fill_mask(row)
        matcher.accept(int(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))[-1]))
    guide = guide_of(request)
    assert guide.forced() == []
    guide.follow([3, 5, *matcher.tokens])
    assert guide.forced() == matcher.forced() != []


def test_a_minimum_bans_the_end_unless_nothing_else_is_allowed() -> None:
    guide = guide_of(message("a", None))
    first = allowed_by(guide)
    banned = frozenset(list(first)[:1])
    assert allowed_by(guide, banned) == (first - banned or first)
    assert allowed_by(guide, first) == first


def test_a_token_that_the_mask_did_not_allow_ends_the_request() -> None:
    guide = guide_of(message("a", None))
    wrong = next(token for token in range(2, NUM_SAMPLED) if token not in allowed_by(guide))
    reason = guide.follow([wrong])
    assert reason is not None and (reason.kind, reason.code, reason.status) == (
        "abort",
        "grammar_failed",
        500,
    )


def test_a_grammar_over_its_budget_says_so_in_its_mask() -> None:
    guide = guide_of(message(BREAKS, None))
    with pytest.raises(GrammarError) as caught:
        for _ in range(30):
            guide.follow([max(allowed_by(guide))])
    reason = failure(caught.value)
    assert (reason.code, reason.status) == ("grammar_too_complex", 400)


def test_a_failure_keeps_its_pointer() -> None:
    error = GrammarError("no", code="unsupported_grammar", param="json_schema", pointer="/properties/a/not")
    reason = failure(error)
    assert (reason.param, reason.pointer, reason.code) == (
        "json_schema",
        "/properties/a/not",
        "unsupported_grammar",
    )
