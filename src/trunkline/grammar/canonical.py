"""Which forced text can be appended as tokens: those that the tokenizer itself makes, whatever comes next.

The argument is in docs/decisions/0009-jump-forward.md.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from trunkline.grammar.protocol import Vocabulary

TAILS = (16, 48)  # accepted tokens that are encoded again in front of the forced text; more only where needed


class Canonical(NamedTuple):
    """Tokens for a prefix of a forced text; [] where no cut is safe. Until `again` bytes of the text are
    taken, in whatever tokens, asking again finds no others."""

    token_ids: list[int]
    again: int


def canonical_tokens(vocabulary: Vocabulary, taken: Sequence[int], text: bytes, *, ends: bool) -> Canonical:
    """The forced `text` follows the tokens `taken`. `ends`: nothing but the end can follow it."""
    if len(text) == 1 and not ends:
        return Canonical([], 1)
    for size in TAILS:
        found = _look(vocabulary, taken, text, ends, size)
        if found is not None:
            return found
    return Canonical([], 0)


def _look(
    vocabulary: Vocabulary, taken: Sequence[int], text: bytes, ends: bool, size: int
) -> Canonical | None:
    """None: more than `size` tokens have to be looked at."""
    tail = list(taken[-size:])
    cut = len(tail) < len(taken)
    before = b"".join(map(vocabulary.piece, tail))
    if cut:  # perhaps inside of a character
        before = before.lstrip(bytes(range(0x80, 0xC0)))
    given, text = len(text), _whole_characters(text)
    try:
        whole = (before + text).decode()
    except UnicodeDecodeError:
        return Canonical([], 0)
    ids, words = vocabulary.encode_words(whole)
    pieces = [vocabulary.piece(token) for token in ids]
    if b"".join(pieces) != before + text:
        return Canonical([], 0)  # a normalizer changed it, or a space was put in front
    ends_at = [0, *accumulate(map(len, pieces))]
    stop = len(ids)
    if not ends:
        stop = _word_start(words, stop)
        while stop and pieces[stop - 1][-1:].isspace():
            stop = _word_start(words, stop)
    start = bisect_left(ends_at, len(before))
    word = _word_start(words, start)
    if cut and _word_start(words, word) == 0:
        return None
    inside = ends_at[start] != len(before) or _word_end(words, start) > start
    if inside and (ends_at[start] != len(before) or ids[word:start] != tail[len(tail) - (start - word) :]):
        # The last token taken would have been a longer one, or the word until here other tokens.
        end = _word_end(words, start)
        return Canonical([], given if end >= stop else ends_at[end] - len(before))
    special = next((i for i in range(start, stop) if ids[i] in vocabulary.special_ids), stop)
    return Canonical(ids[start : max(start, special)], given if special == stop else 0)


def _word_start(words: Sequence[int], end: int) -> int:
    """First token of the word whose tokens end before `end`."""
    start = end
    while start > 0 and words[start - 1] == words[end - 1]:
        start -= 1
    return start


def _word_end(words: Sequence[int], start: int) -> int:
    """Behind the last token of the word that the token before `start` belongs to."""
    end = start
    while 0 < end < len(words) and words[end] == words[end - 1]:
        end += 1
    return end


def _whole_characters(text: bytes) -> bytes:
    """Without the bytes of a last character that is not complete."""
    for missing in range(1, min(4, len(text)) + 1):
        lead = text[-missing]
        if lead & 0xC0 != 0x80:
            size = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return text if size == missing else text[:-missing]
    return text
