"""The default backend: llguidance, an Earley parser over lazily built lexers, with masks from a token trie.

It only ever sees Lark grammars that are written here, so what is accepted is decided in this package.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from ctypes import addressof, c_char
from functools import cached_property

import llguidance
import numpy as np

from trunkline.grammar.backend import Backend
from trunkline.grammar.json_text import Layout
from trunkline.grammar.lark import LarkGrammar
from trunkline.grammar.matcher import CompiledGrammar
from trunkline.grammar.protocol import GrammarError, GrammarKind, MaskRow, Vocabulary

log = logging.getLogger(__name__)

BYTES_PER_GRAMMAR = 64 << 10  # of a compiled grammar beside its text; lexer states come on top as it is used


MASK_THREADS = 4


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


_SPECIAL = re.compile(r"<\[([0-9]+)\]>")  # as it stands in a grammar; texts have no such characters there


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
            b"\xff<special>" + vocabulary.piece(token) if token in special else vocabulary.piece(token)
            for token in range(vocabulary.num_tokens)
        ]

    def __call__(self, text: bytes | str) -> list[int]:
        decoded = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._vocabulary.encode(decoded, add_special_tokens=False)


class LlguidanceBackend(Backend):
    """Builds a trie of the tokens once (1 s for 150,000)."""

    def __init__(self, vocabulary: Vocabulary, eos_ids: Sequence[int], layout: Layout | None = None) -> None:
        super().__init__(vocabulary, eos_ids, layout)
        self.trie = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Source(vocabulary, eos_ids)),
            eos_token=list(eos_ids),
            slices=list(SLICES),
        )
        self.threads = min(MASK_THREADS, len(os.sched_getaffinity(0)))

    @cached_property
    def executor(self) -> llguidance.LLExecutor:
        """Its threads start when they are needed first, which is never in a sandbox."""
        return llguidance.LLExecutor(self.threads)

    def new_text(self) -> LarkGrammar:
        return LarkGrammar(self.specials)

    def compile_text(self, text: str, kind: GrammarKind, threads: int = 1) -> CompiledGrammar:
        """Copies of a parser share its lexer and the lock of it: a parser for each thread."""
        named = set(map(int, _SPECIAL.findall(text)))
        starts = [_Parser(self, self._matcher(text, kind), bool(named), lane) for lane in range(threads)]
        num_bytes = threads * BYTES_PER_GRAMMAR + 16 * len(text)
        return CompiledGrammar(self.tokens.with_special(named), starts, num_bytes)

    def _matcher(self, text: str, kind: GrammarKind) -> llguidance.LLMatcher:
        matcher = llguidance.LLMatcher(
            self.trie,
            llguidance.LLMatcher.grammar_from_lark(text),
            log_level=0,
            limits=EBNF_LIMITS if kind == "ebnf" else LIMITS,
        )
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first mask, so that what can't even start is refused now
        if matcher.is_error():
            log.info("llguidance: %s", matcher.get_error())
            raise GrammarError("the grammar is beyond the limits of its backend", code="grammar_too_complex")
        return matcher


class _Parser:
    """`matcher.Parser` over llguidance's. EOS never reaches the latter: it would close it for rollback."""

    def __init__(
        self, backend: LlguidanceBackend, inner: llguidance.LLMatcher, special: bool, lane: int
    ) -> None:
        """`special`: the grammar names special tokens. Parsers of a grammar and lane wait for each other."""
        self._backend = backend
        self._special = special
        self._inner = inner
        self._lane = lane

    def prepare(self, parsers: Sequence[_Parser]) -> None:
        live = [parser for parser in parsers if not parser._inner.is_stopped()]
        if not live:
            return
        live.sort(key=lambda parser: parser._lane)  # each thread begins with a stretch of them
        unread = np.empty((len(live), self._backend.tokens.words), np.int32)  # a matcher keeps its last mask
        self._backend.executor.unsafe_compute_mask_ptr(
            [(parser._inner, at) for at, parser in enumerate(live)],
            unread.ctypes.data,
            unread.strides[0],
            len(live),
        )

    def fill_mask(self, row: MaskRow) -> None:
        address = addressof(c_char.from_buffer(row.data))  # a microsecond less than `row.ctypes`
        self._inner.unsafe_compute_mask_ptr(address, row.nbytes)
        self._check()

    def accept(self, token_id: int) -> bool:
        if self._inner.validate_tokens([token_id]) != 1:
            return False
        if not self._inner.consume_token(token_id):
            self._check()
        return True

    def rollback(self, count: int) -> None:
        self._inner.rollback(count)
        self._check()

    def forced_text(self) -> bytes:
        if self._inner.is_stopped():
            return b""
        # Having forced a special token, a matcher computes no more masks, so a copy is asked.
        inner = self._inner.deep_copy() if self._special else self._inner
        text: bytes = inner.compute_ff_bytes()
        return text

    def count_valid(self, token_ids: list[int]) -> int:
        return self._inner.validate_tokens(token_ids)

    def ends_after(self, text: bytes) -> bool:
        trial = self._inner.deep_copy()
        tokens = self._backend.trie.greedy_tokenize(text.decode("utf-8", "ignore"))
        return (
            trial.validate_tokens(tokens) == len(tokens)
            and trial.consume_tokens(tokens)
            and trial.is_stopped()
        )

    def may_end(self) -> bool:
        return self._inner.is_accepting() and not self._inner.is_error()

    def is_over(self) -> bool:
        return self._inner.is_stopped() and not self._inner.is_error()

    def copy(self) -> _Parser:
        return _Parser(self._backend, self._inner.deep_copy(), self._special, self._lane)

    def _check(self) -> None:
        if self._inner.is_error():
            log.info("llguidance: %s", self._inner.get_error())
            raise GrammarError(
                "the grammar takes more work here than one token may: it is too ambiguous or too large",
                code="grammar_too_complex",
            )
