"""A second backend, on demand: xgrammar, an Earley parser over byte automata (Dong et al. 2024,
arXiv:2411.15100).

It gets grammars written here, as the other one does, so what is accepted is the same: its own reader of
schemas is not used, which takes some keywords for less than they say. Loading it loads torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import xgrammar

from trunkline.grammar.backend import Backend
from trunkline.grammar.ebnf_text import EbnfGrammar
from trunkline.grammar.json_text import Layout
from trunkline.grammar.matcher import CompiledGrammar, TokenTable
from trunkline.grammar.protocol import GrammarError, GrammarKind, MaskRow, Vocabulary

START = "start"
CALL_SECONDS = 0.05  # of CPU time for a mask or a token: xgrammar itself has no limit


@contextmanager
def _bounded() -> Iterator[None]:
    """Raises GrammarError behind a call that took too long. What an ambiguous grammar takes grows from token
    to token, so its request ends before it holds up others for much longer than this."""
    begun = time.thread_time()
    yield
    if time.thread_time() - begun > CALL_SECONDS:
        raise GrammarError(
            "the grammar takes more work here than one token may: it is too ambiguous or too large",
            code="grammar_too_complex",
        )


class XgrammarBackend(Backend):
    """Sorts the tokens once."""

    def __init__(self, vocabulary: Vocabulary, eos_ids: Sequence[int], layout: Layout | None = None) -> None:
        super().__init__(vocabulary, eos_ids, layout)
        special = vocabulary.special_ids | set(eos_ids)
        pieces = [
            b"" if token in special else vocabulary.piece(token) for token in range(vocabulary.num_tokens)
        ]
        self._compiler = xgrammar.GrammarCompiler(
            xgrammar.TokenizerInfo(
                pieces,
                vocab_type=xgrammar.VocabType.RAW,
                vocab_size=len(pieces),
                stop_token_ids=list(eos_ids),
            ),
            max_threads=1,
            cache_enabled=False,
        )

    def new_text(self) -> EbnfGrammar:
        return EbnfGrammar(self.specials)

    def compile_text(self, text: str, kind: GrammarKind, threads: int = 1) -> CompiledGrammar:
        try:
            compiled = self._compiler.compile_grammar(xgrammar.Grammar.from_ebnf(text, root_rule_name=START))
        except RuntimeError as error:
            raise GrammarError(
                f"the grammar is beyond what xgrammar takes: {error}", code="grammar_too_complex"
            ) from error
        parser = _Parser(self.tokens, xgrammar.GrammarMatcher(compiled))
        return CompiledGrammar(self.tokens, [parser], compiled.memory_size_bytes + len(text))


class _Parser:
    """`matcher.Parser` over xgrammar's."""

    def __init__(self, tokens: TokenTable, inner: xgrammar.GrammarMatcher) -> None:
        self._tokens = tokens
        self._inner = inner

    def fill_mask(self, row: MaskRow) -> None:
        with _bounded():
            if not self._inner.fill_next_token_bitmask(row.reshape(1, -1)):
                row[:] = -1  # every token may come

    def prepare(self, parsers: Sequence[_Parser]) -> None:
        """Nothing: a mask is not kept, and of a batch nothing tells which row took too long."""

    def accept(self, token_id: int) -> bool:
        with _bounded():
            return bool(self._inner.accept_token(token_id))

    def rollback(self, count: int) -> None:
        self._inner.rollback(count)

    def forced_text(self) -> bytes:
        return str(self._inner.find_jump_forward_string()).encode()

    def count_valid(self, token_ids: list[int]) -> int:
        trial = self._inner.fork()
        return next(
            (at for at, token in enumerate(token_ids) if not trial.accept_token(token)), len(token_ids)
        )

    def ends_after(self, text: bytes) -> bool:
        trial = self.copy()
        return bool(trial._inner.accept_string(text)) and trial.is_over()

    def may_end(self) -> bool:
        return bool(self._inner.is_completed())

    def is_over(self) -> bool:
        if not self.may_end():
            return False
        row = np.empty(self._tokens.words, np.int32)
        self.fill_mask(row)
        return not np.any(row & self._tokens.text_mask)

    def copy(self) -> _Parser:
        return _Parser(self._tokens, self._inner.fork())
