"""What the matchers of all backends share: which tokens are text, where EOS may come, forced tokens."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from copy import copy
from itertools import cycle
from typing import Protocol, Self

import numpy as np

from trunkline.grammar.canonical import canonical_tokens
from trunkline.grammar.protocol import MaskRow, Matcher, Vocabulary

_SPECIAL = re.compile(rb"\xff\[([0-9]+)\]")


class Parser(Protocol):
    """A backend's own matcher, for tokens of text alone: EOS never reaches it."""

    def fill_mask(self, row: MaskRow) -> None:
        """Overwrite `row`, as wide as the vocabulary; the bit of the first EOS token is set where the text
        may end. Raises GrammarError."""

    def prepare(self, parsers: Sequence[Self]) -> None:
        """See `protocol.Matcher`."""

    def accept(self, token_id: int) -> bool:
        """Raises GrammarError."""

    def rollback(self, count: int) -> None:
        """Raises GrammarError."""

    def forced_text(self) -> bytes:
        """Text that must come next; b"\\xff[ID]" in it stands for a special token."""

    def count_valid(self, token_ids: list[int]) -> int:
        """How many of the tokens may follow one after the other."""

    def ends_after(self, text: bytes) -> bool:
        """Can nothing follow this text, which is forced?"""

    def may_end(self) -> bool: ...

    def is_over(self) -> bool:
        """Nothing but EOS may follow. Raises GrammarError."""

    def copy(self) -> Self: ...


class TokenTable:
    """A vocabulary in the forms that matchers need."""

    def __init__(self, vocabulary: Vocabulary, eos_ids: Sequence[int]) -> None:
        """`eos_ids`: the tokens that may end a constrained text, at least one. Raises ValueError for none."""
        if not eos_ids:
            raise ValueError("a grammar needs an EOS token to end with")
        self.vocabulary = vocabulary
        self.eos_ids = tuple(eos_ids)
        self.words = (vocabulary.num_tokens + 31) // 32
        self.eos_mask = np.zeros(self.words, np.int32)
        for token in eos_ids:
            self.eos_mask.view(np.uint32)[token >> 5] |= np.uint32(1 << (token & 31))
        self.eos_word = eos_ids[0] >> 5
        self.eos_bit = self.eos_mask[self.eos_word]
        never = np.zeros(self.words * 32, bool)
        never[[t for t in range(vocabulary.num_tokens) if not vocabulary.piece(t)]] = True
        never[sorted(vocabulary.special_ids | set(eos_ids))] = True
        never[vocabulary.num_tokens :] = True
        self.text_mask = np.packbits(~never, bitorder="little").view(np.int32)

    def with_special(self, token_ids: Collection[int]) -> TokenTable:
        """The same, with these special tokens among those that may come."""
        if not token_ids:
            return self
        tokens = copy(self)
        tokens.text_mask = self.text_mask.copy()
        for token in token_ids:
            tokens.text_mask.view(np.uint32)[token >> 5] |= np.uint32(1 << (token & 31))
        return tokens

    def is_text(self, token_id: int) -> bool:
        word = token_id >> 5
        return 0 <= word < self.words and bool(self.text_mask[word] >> (token_id & 31) & 1)


class TokenMatcher:
    """`protocol.Matcher` over a backend's parser."""

    def __init__(self, tokens: TokenTable, parser: Parser, taken: list[int]) -> None:
        self._tokens = tokens
        self._parser = parser
        self._taken = taken
        self._ended = False
        self._length = 0  # bytes of text that were taken
        # Where the forced text seen last ends, and a stretch of it where nothing is forced (see `Canonical`).
        self._vain = (-1, range(0))

    def fill_mask(self, row: MaskRow) -> None:
        known, rest = row[: self._tokens.words], row[self._tokens.words :]
        if self._ended or self._parser.is_over():
            known[:] = self._tokens.eos_mask
        else:
            self._parser.fill_mask(known)
            may_end = known[self._tokens.eos_word] & self._tokens.eos_bit
            known &= self._tokens.text_mask
            if may_end:
                known |= self._tokens.eos_mask
        if len(rest):
            rest.fill(0)

    def prepare(self, matchers: Sequence[Matcher]) -> None:
        same = (matcher for matcher in matchers if isinstance(matcher, TokenMatcher))
        self._parser.prepare([matcher._parser for matcher in same if not matcher._ended])

    def accept(self, token_id: int) -> bool:
        if self._ended:
            return False
        if token_id in self._tokens.eos_ids:
            self._ended = self._parser.may_end()
            return self._ended
        if not self._tokens.is_text(token_id) or not self._parser.accept(token_id):
            return False
        self._taken.append(token_id)
        self._length += len(self._tokens.vocabulary.piece(token_id))
        return True

    def rollback(self, count: int) -> None:
        if not 0 <= count <= len(self._taken) + self._ended:
            raise ValueError(f"{count} tokens to undo, {len(self._taken) + self._ended} were accepted")
        if count and self._ended:
            self._ended = False
            count -= 1
        if count:
            self._length -= sum(map(len, map(self._tokens.vocabulary.piece, self._taken[-count:])))
            del self._taken[-count:]
            self._vain = (-1, range(0))
            self._parser.rollback(count)

    def forced(self) -> list[int]:
        if self._ended:
            return []
        text = self._parser.forced_text()
        if not text:
            return []
        if special := _SPECIAL.match(text):
            return [int(special[1])]
        text, cut, _ = text.partition(b"\xff")  # a special token ends the text before it
        end = self._length + len(text)
        if end == self._vain[0] and self._length in self._vain[1]:
            return []
        ends = bool(cut) or self._parser.ends_after(text)
        tokens, again = canonical_tokens(self._tokens.vocabulary, self._taken, text, ends=ends)
        forced = sum(map(len, map(self._tokens.vocabulary.piece, tokens)))
        if text[0] & 0xC0 != 0x80:  # inside of a character, `ends` is not known
            self._vain = end, range(self._length + forced, self._length + again)
        return tokens[: self._parser.count_valid(tokens)] if tokens else []

    def fork(self) -> TokenMatcher:
        copy = TokenMatcher(self._tokens, self._parser.copy(), self._taken.copy())
        copy._ended, copy._length, copy._vain = self._ended, self._length, self._vain
        return copy

    @property
    def finished(self) -> bool:
        return self._ended or self._parser.is_over()


class CompiledGrammar:
    """Parsers that were never moved, one of which is copied for each request, in turn."""

    def __init__(self, tokens: TokenTable, starts: Sequence[Parser], num_bytes: int) -> None:
        self._tokens = tokens
        self._starts = cycle(starts)
        self.num_bytes = num_bytes

    def matcher(self) -> TokenMatcher:
        return TokenMatcher(self._tokens, next(self._starts).copy(), [])
