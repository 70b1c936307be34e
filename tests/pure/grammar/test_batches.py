"""The masks of many rows at once are those of each alone, whatever becomes of the others."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from tests.pure.grammar.support import BACKENDS, eos_id, tokenizer
from tests.sim.grammar import BREAKS, ToyMatcher
from trunkline.engine import guidance
from trunkline.engine.guidance import fill_masks
from trunkline.grammar.backend import make_backend
from trunkline.grammar.matcher import TokenMatcher
from trunkline.grammar.protocol import GrammarError, GrammarKind, GrammarSpec, Matcher
from trunkline.scheduler.guide import Guide
from trunkline.types import Thinking

WORDS = (tokenizer().num_tokens + 31) // 32 + 1  # a model's vocabulary may be wider than the tokenizer's
NOTHING = frozenset[int]()
CONSTRAINTS: tuple[tuple[GrammarKind, str], ...] = (
    ("json_object", ""),
    ("json_schema", '{"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}'),
    ("regex", "[a-z ]{3,40}(one|two)*"),
    ("ebnf", 'root ::= t ("+" t)*\nt ::= [0-9]+ | "(" root ")" | [a-z]+'),
)
# So ambiguous that a mask is more work than one may be, after some tokens.
AMBIGUOUS = 'root ::= s\ns ::= s s | s s s | "a" | "aa" | "aaa" |  "b"'


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows were computed at once, each time. All but the first row are, whatever time they take."""
    monkeypatch.setattr(guidance, "WORTH_THREADS", -1.0)
    found: list[int] = []
    inner = TokenMatcher.prepare

    def spy(self: TokenMatcher, matchers: Sequence[Matcher]) -> None:
        found.append(len(matchers))
        inner(self, matchers)

    monkeypatch.setattr(TokenMatcher, "prepare", spy)
    return found


def fill(
    guides: Sequence[Guide], banned: frozenset[int] = NOTHING
) -> tuple[np.ndarray, list[Exception | None]]:
    words = np.full((len(guides), WORDS), 7, np.int32)
    return words, fill_masks([(guide, banned) for guide in guides], words)


def some(words: np.ndarray, rng: random.Random) -> int:
    return rng.choice(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


@pytest.mark.parametrize("name", BACKENDS)
def test_masks_of_a_batch_are_those_of_its_rows(name: str, prepared: list[int]) -> None:
    backend = make_backend(name, tokenizer(), [eos_id()])
    grammars = [backend.compile(GrammarSpec(*one)) for one in CONSTRAINTS]
    rng, banned = random.Random(3), frozenset([eos_id()])

    def guides() -> list[Guide]:
        found = [Guide(grammars[i % 4].matcher(), [eos_id()]) for i in range(22)]
        found.insert(5, Guide(None, (), Thinking((9,), 4)))
        return [*found, Guide(grammars[0].matcher(), [eos_id()], Thinking((9,), 6))]

    batch, alone = guides(), guides()
    for step in range(24):
        words, errors = fill(batch, banned if step < 4 else NOTHING)
        assert errors == [None] * len(batch)
        for at, guide in enumerate(alone):
            row = np.full(WORDS, 1, np.int32)
            guide.fill_mask(row, banned if step < 4 else NOTHING)
            assert np.array_equal(row, words[at]), (step, at)
            token = some(row, rng)
            if token < tokenizer().num_tokens and token != eos_id():
                assert guide.follow([token]) is None and batch[at].follow([token]) is None
    assert len(prepared) > 12 and max(prepared) > 10


def test_a_row_that_fails_fails_alone(prepared: list[int]) -> None:
    backend = make_backend("llguidance", tokenizer(), [eos_id()])
    good = [backend.compile(GrammarSpec(*one)) for one in CONSTRAINTS]
    hostile = backend.compile(GrammarSpec("ebnf", AMBIGUOUS))
    bad = Guide(hostile.matcher(), [eos_id()])
    (letter,) = tokenizer().encode("a", add_special_tokens=False)
    guides = [Guide(good[i % 4].matcher(), [eos_id()]) for i in range(9)]
    guides.insert(4, bad)
    before, _ = fill(guides)
    for _ in range(400):
        words, errors = fill(guides)
        assert [error for at, error in enumerate(errors) if at != 4] == [None] * 9
        assert np.array_equal(np.delete(words, 4, 0), np.delete(before, 4, 0))
        if errors[4] is not None:
            break
        bad.follow([letter])
    assert isinstance(errors[4], GrammarError) and errors[4].code == "grammar_too_complex"
    assert max(prepared) == 9


def test_few_fast_rows_wake_no_thread() -> None:
    asked = Counter[str]()
    words = np.zeros((3, 2), np.int32)
    matchers = [ToyMatcher("a", asked), ToyMatcher(BREAKS, asked), ToyMatcher("b", asked)]
    assert fill_masks([(Guide(matcher, (1,)), NOTHING) for matcher in matchers], words) == [None] * 3
    assert asked["masks"] and not asked["prepared"]
