"""The default backend: llguidance, an Earley parser over lazily built lexers, with masks from a token trie.

It only ever sees Lark grammars that are written here, so what is accepted is decided in this package.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import llguidance
import numpy as np

from trunkline.grammar.canonical import canonical_tokens
from trunkline.grammar.json_text import Layout
from trunkline.grammar.protocol import GrammarError, GrammarKind, GrammarSpec, MaskRow, Vocabulary
from trunkline.grammar.translate import lark_of

log = logging.getLogger(__name__)

BYTES_PER_GRAMMAR = 64 << 10  # of a compiled grammar beside its text; lexer states come on top as it is used


def _limits(items_in_row: int) -> llguidance.LLParserLimits:
    return llguidance.LLParserLimits(
        max_items_in_row=items_in_row,
        initial_lexer_fuel=1_000_000,  # about 20 ms
        step_lexer_fuel=100_000,  # about 10 ms
        step_max_items=50_000,  # about 10 ms
        max_lexer_states=20_000,  # about 40 MB
        max_grammar_size=500_000,
        verbose_errors=False,
    )


# Items grow with the members of an object in rules that are written here; in a grammar that a stranger wrote
# they may grow with the square of the text, up to half a second for a token.
LIMITS = _limits(2_000)
EBNF_LIMITS = _limits(300)

# Tokens that are plain text of a JSON string, by length: where all of a group may follow, its tokens are not
# looked at one by one.
_PLAIN = r'[^"\\\x00-\x1F\x7F]'
SLICES = (r"[\x20\x0A\x0D\x09]+", *(f"{_PLAIN}{{1,{size}}}" for size in (3, 6, 10, 16, 30)), f"{_PLAIN}+")


class _Source:
    """What llguidance's tokenizer wrapper asks for."""

    is_tokenizer_wrapper = True

    def __init__(self, vocabulary: Vocabulary, eos_ids: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self.eos_token_id = eos_ids[0]
        self.bos_token_id = None
        special = vocabulary.special_ids | set(eos_ids)
        self.special_token_ids = sorted(special)
        self.tokens = [
            # A special token has bytes of its own, told apart by 0xFF; other tokens are never without bytes.
            b"\xff<special>" if token in special else vocabulary.piece(token)
            for token in range(vocabulary.num_tokens)
        ]

    def __call__(self, text: bytes | str) -> list[int]:
        decoded = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._vocabulary.encode(decoded, add_special_tokens=False)


class LlguidanceBackend:
    """Compiles for one tokenizer; builds a trie of its tokens once (1 s for 150,000)."""

    def __init__(self, vocabulary: Vocabulary, eos_ids: Sequence[int], layout: Layout | None = None) -> None:
        """`eos_ids`: the tokens that may end a constrained text, at least one. Raises ValueError for none."""
        if not eos_ids:
            raise ValueError("a grammar needs an EOS token to end with")
        self._layout = layout or Layout()
        self._tokens = _Tokens(vocabulary, tuple(eos_ids))

    def compile(self, spec: GrammarSpec) -> LlguidanceGrammar:
        """Raises GrammarError. For a budget of time and memory see `compiler`."""
        return self.compile_lark(lark_of(spec, self._layout), spec.kind)

    def compile_lark(self, lark: str, kind: GrammarKind) -> LlguidanceGrammar:
        """From the text of a grammar that was written for a constraint of this kind."""
        matcher = llguidance.LLMatcher(
            self._tokens.trie,
            llguidance.LLMatcher.grammar_from_lark(lark),
            log_level=0,
            limits=EBNF_LIMITS if kind == "ebnf" else LIMITS,
        )
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first mask, so that what can't even start is refused now
        if matcher.is_error():
            log.info("llguidance: %s", matcher.get_error())
            raise GrammarError("the grammar is beyond the limits of its backend", code="grammar_too_complex")
        return LlguidanceGrammar(self._tokens, matcher, len(lark))


class _Tokens:
    """A vocabulary in the forms that matchers need."""

    def __init__(self, vocabulary: Vocabulary, eos_ids: tuple[int, ...]) -> None:
        self.vocabulary = vocabulary
        self.eos_ids = frozenset(eos_ids)
        self.words = (vocabulary.num_tokens + 31) // 32
        self.trie = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Source(vocabulary, eos_ids)),
            eos_token=list(eos_ids),
            slices=list(SLICES),
        )
        self.eos_mask = np.zeros(self.words, np.int32)
        for token in eos_ids:
            self.eos_mask.view(np.uint32)[token >> 5] |= np.uint32(1 << (token & 31))
        self.eos_word = eos_ids[0] >> 5
        self.eos_bit = self.eos_mask[self.eos_word]
        never = np.zeros(self.words * 32, bool)
        never[[t for t in range(vocabulary.num_tokens) if not vocabulary.piece(t)]] = True
        never[sorted(vocabulary.special_ids | self.eos_ids)] = True
        never[vocabulary.num_tokens :] = True
        self.text_mask = np.packbits(~never, bitorder="little").view(np.int32)


class LlguidanceGrammar:
    """A matcher that was never moved, and is copied for each request."""

    def __init__(self, tokens: _Tokens, start: llguidance.LLMatcher, source_length: int) -> None:
        self._tokens = tokens
        self._start = start
        self.num_bytes = BYTES_PER_GRAMMAR + 16 * source_length

    def matcher(self) -> LlguidanceMatcher:
        return LlguidanceMatcher(self._tokens, self._start.deep_copy(), [])


class LlguidanceMatcher:
    """`protocol.Matcher` over llguidance's. EOS never reaches the latter: it would close it for rollback."""

    def __init__(self, tokens: _Tokens, inner: llguidance.LLMatcher, taken: list[int]) -> None:
        self._tokens = tokens
        self._inner = inner
        self._taken = taken
        self._ended = False

    def fill_mask(self, row: MaskRow) -> None:
        words = self._tokens.words
        if self._ended or self._inner.is_stopped():
            self._check()
            row[:words] = self._tokens.eos_mask
        else:
            self._inner.unsafe_compute_mask_ptr(row.ctypes.data, words * 4)
            self._check()
            may_end = row[self._tokens.eos_word] & self._tokens.eos_bit
            row[:words] &= self._tokens.text_mask
            if may_end:
                row[:words] |= self._tokens.eos_mask
        row[words:] = 0

    def accept(self, token_id: int) -> bool:
        if self._ended:
            return False
        if token_id in self._tokens.eos_ids:
            self._ended = self._may_end()
            return self._ended
        if not self._is_text(token_id) or self._inner.validate_tokens([token_id]) != 1:
            return False
        if not self._inner.consume_token(token_id):
            self._check()
        self._taken.append(token_id)
        return True

    def rollback(self, count: int) -> None:
        if not 0 <= count <= len(self._taken) + self._ended:
            raise ValueError(f"{count} tokens to undo, {len(self._taken) + self._ended} were accepted")
        if count and self._ended:
            self._ended = False
            count -= 1
        if count:
            self._inner.rollback(count)
            del self._taken[-count:]
            self._check()

    def forced(self) -> list[int]:
        if self._ended or self._inner.is_stopped():
            return []
        text = self._inner.compute_ff_bytes()
        if not text:
            return []
        tokens = canonical_tokens(self._tokens.vocabulary, self._taken, text, ends=self._ends_after(text))
        allowed = self._inner.validate_tokens(tokens) if tokens else 0
        return tokens[:allowed]

    def fork(self) -> LlguidanceMatcher:
        copy = LlguidanceMatcher(self._tokens, self._inner.deep_copy(), self._taken.copy())
        copy._ended = self._ended
        return copy

    @property
    def finished(self) -> bool:
        return self._ended or (self._inner.is_stopped() and not self._inner.is_error())

    def _may_end(self) -> bool:
        return self._inner.is_accepting() and not self._inner.is_error()

    def _is_text(self, token_id: int) -> bool:
        word = token_id >> 5
        return 0 <= word < self._tokens.words and bool(self._tokens.text_mask[word] >> (token_id & 31) & 1)

    def _ends_after(self, text: bytes) -> bool:
        """Can nothing follow the forced text?"""
        trial = self._inner.deep_copy()
        tokens = self._tokens.trie.greedy_tokenize(text.decode("utf-8", "ignore"))
        return (
            trial.validate_tokens(tokens) == len(tokens)
            and trial.consume_tokens(tokens)
            and trial.is_stopped()
        )

    def _check(self) -> None:
        if self._inner.is_error():
            log.info("llguidance: %s", self._inner.get_error())
            raise GrammarError(
                "the grammar takes more work here than one token may: it is too ambiguous or too large",
                code="grammar_too_complex",
            )
