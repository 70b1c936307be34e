"""Token ids to text, one token at a time."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Iterable
from typing import Protocol

from trunkline.text.pieces import PieceRules


class Vocabulary(Protocol):
    """What decoding needs to know of a tokeniser."""

    rules: PieceRules
    special_ids: frozenset[int]

    def piece(self, token_id: int) -> bytes:
        """Bytes of one token; empty for an id that the tokeniser does not have."""


class Detokenizer:
    """Decodes a sequence of tokens; the joined results of `feed` and `flush` are the whole text.

    A character is returned when its last byte has come. Bytes that can't be UTF-8 give U+FFFD, one for each
    maximal invalid part, as Unicode recommends. `at_start`: the sequence starts a text, so that a leading
    space which the tokeniser had added goes; an output that continues a prompt keeps it. `shown`: special
    tokens that are not skipped.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        at_start: bool = False,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self._vocabulary = vocabulary
        self._skipped = vocabulary.special_ids - shown if skip_special_tokens else frozenset()
        self._space_specials = spaces_between_special_tokens
        self._utf8 = getincrementaldecoder("utf-8")("replace")
        rules = vocabulary.rules
        self._strip_char, self._strip_left = rules.strip_start if at_start else ("", 0)
        self._separator = b"" if at_start else rules.separator
        self._last_special = False

    def feed(self, token_id: int) -> str:
        """The text that this token completes; often empty inside a character of several bytes."""
        if token_id in self._skipped:
            return ""
        special = token_id in self._vocabulary.special_ids
        piece = self._vocabulary.piece(token_id)
        if not (special and self._last_special and not self._space_specials):
            piece = self._separator + piece
        self._separator = self._vocabulary.rules.separator
        self._last_special = special
        return self._strip(self._utf8.decode(piece))

    def flush(self) -> str:
        """The sequence is over: what is left of an incomplete character becomes U+FFFD."""
        return self._strip(self._utf8.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        while self._strip_left and text:
            if text[0] != self._strip_char:
                self._strip_left = 0
            else:
                self._strip_left -= 1
                text = text[1:]
        return text

    def decode(self, token_ids: Iterable[int]) -> str:
        """All at once."""
        return "".join([*map(self.feed, token_ids), self.flush()])
