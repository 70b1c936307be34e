"""Which forced text can be appended as tokens: those that the tokenizer itself makes, whatever comes next.

The argument is in docs/decisions/0009-jump-forward.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from trunkline.grammar.protocol import Vocabulary

MAX_TAIL = 48  # accepted tokens that are encoded again in front of the forced text


def canonical_tokens(vocabulary: Vocabulary, taken: Sequence[int], text: bytes, *, ends: bool) -> list[int]:
    """Tokens for a prefix of the forced `text`, which follows the tokens `taken`; [] where no cut is safe.

    `ends`: nothing but the end can follow the text.
    """
    tail = list(taken[-MAX_TAIL:])
    cut = len(tail) < len(taken)
    before = b"".join(map(vocabulary.piece, tail))
    if cut:  # perhaps inside of a character
        before = before.lstrip(bytes(range(0x80, 0xC0)))
    text = _whole_characters(text)
    try:
        whole = (before + text).decode()
    except UnicodeDecodeError:
        return []
    ids, words = vocabulary.encode_words(whole)
    pieces = [vocabulary.piece(token) for token in ids]
    if b"".join(pieces) != before + text:
        return []  # a normalizer changed it, or a space was put in front
    ends_at = [0, *accumulate(map(len, pieces))]
    if len(before) not in ends_at:
        return []  # the last token taken would have been a longer one
    start = ends_at.index(len(before))
    left = _word_start(words, _word_start(words, start))
    if (left == 0 and cut) or ids[left:start] != tail[len(tail) - (start - left) :]:
        return []
    stop = len(ids)
    if not ends:
        stop = _word_start(words, stop)
        while stop > start and pieces[stop - 1][-1:].isspace():
            stop = _word_start(words, stop)
    for index in range(start, stop):
        if ids[index] in vocabulary.special_ids:
            return ids[start:index]
    return ids[start : max(start, stop)]


def _word_start(words: Sequence[int], end: int) -> int:
    """First token of the word whose tokens end before `end`."""
    start = end
    while start > 0 and words[start - 1] == words[end - 1]:
        start -= 1
    return start


def _whole_characters(text: bytes) -> bytes:
    """Without the bytes of a last character that is not complete."""
    for missing in range(1, min(4, len(text)) + 1):
        lead = text[-missing]
        if lead & 0xC0 != 0x80:
            size = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return text if size == missing else text[:-missing]
    return text
