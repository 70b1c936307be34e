"""Stop strings are found wherever the text is cut."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline.text.stop import StopMatcher

AB = st.text("ab<", max_size=12)


def splits(text: str) -> Iterator[list[str]]:
    """Every way to cut `text` into pieces."""
    for count in range(len(text)):
        for cuts in itertools.combinations(range(1, len(text)), count):
            yield [text[a:b] for a, b in itertools.pairwise((0, *cuts, len(text)))]


def run(stops: Sequence[str], pieces: Sequence[str], keep: bool = False) -> tuple[str, str | None]:
    matcher, shown = StopMatcher(stops, keep_match=keep), ""
    for piece in pieces:
        shown += matcher.feed(piece)
        if matcher.matched is not None:
            return shown, matcher.matched
    return shown + matcher.flush(), None


def expected(stops: Sequence[str], text: str) -> tuple[str, str | None]:
    """By definition: the shortest prefix that ends with a stop string, and the longest such string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@pytest.mark.parametrize("stops", [["END"], ["abab", "bac"], ["b", "abc"], ["aa"], ["<|x|>", "\n\n"]])
@pytest.mark.parametrize("text", ["xENENDy", "ababac", "aababc", "a\n\n<|x|", "aaa", ""])
def test_every_split(stops: list[str], text: str) -> None:
    for pieces in splits(text):
        assert run(stops, pieces) == expected(stops, text)


@given(st.lists(st.text("ab<", min_size=1, max_size=4), min_size=1, max_size=4), st.lists(AB, max_size=6))
def test_random_stops_and_pieces(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    shown, matched = expected(stops, text)
    assert run(stops, pieces) == (shown, matched)
    assert run(stops, pieces, keep=True) == (shown + (matched or ""), matched)


@given(st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), AB)
def test_holds_back_exactly_what_may_become_a_stop(stops: list[str], text: str) -> None:
    matcher = StopMatcher(stops)
    shown = matcher.feed(text)
    if matcher.matched is None:
        held = text[len(shown) :]
        longest = max(
            (text[at:] for at in range(len(text)) if any(stop.startswith(text[at:]) for stop in stops)),
            key=len,
            default="",
        )
        assert held == longest
