"""The base of backends: constraints are read here, and a backend compiles what was written for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from trunkline.grammar.json_text import Layout
from trunkline.grammar.matcher import CompiledGrammar, TokenTable
from trunkline.grammar.protocol import GrammarError, GrammarKind, GrammarSpec, Vocabulary
from trunkline.grammar.rules import GrammarText
from trunkline.grammar.translate import write_grammar


class Backend(Protocol):
    """Compiles for one tokenizer. Safe to share between threads."""

    tokens: TokenTable
    specials: Mapping[str, int]  # texts of special tokens, but for EOS
    threads: int = 1  # that compute masks of one grammar at once
    _layout: Layout

    def __init__(self, vocabulary: Vocabulary, eos_ids: Sequence[int], layout: Layout | None = None) -> None:
        """`eos_ids`: the tokens that may end a constrained text, at least one. Raises ValueError for none."""
        self.tokens = TokenTable(vocabulary, eos_ids)
        named = sorted(vocabulary.special_ids - set(eos_ids))
        pieces = ((vocabulary.piece(token).decode("utf-8", "replace"), token) for token in named)
        self.specials = {text: token for text, token in pieces if text}
        self._layout = layout or Layout()

    def new_text(self) -> GrammarText:
        """An empty grammar in the backend's dialect."""

    def write(self, spec: GrammarSpec) -> str:
        """A constraint as a grammar's text. Raises GrammarError."""
        return write_grammar(spec, self._layout, self.new_text())

    def compile_text(self, text: str, kind: GrammarKind, threads: int = 1) -> CompiledGrammar:
        """From a text that was written for a constraint of this kind. Raises GrammarError."""

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        """May take long and a lot of memory: see `GrammarCompiler`. Raises GrammarError."""
        return self.compile_text(self.write(spec), spec.kind, self.threads)


def make_backend(
    name: str, vocabulary: Vocabulary, eos_ids: Sequence[int], layout: Layout | None = None
) -> Backend:
    """Takes about a second for 150,000 tokens. Raises GrammarError for one that can't be loaded."""
    if name == "xgrammar":
        try:
            from trunkline.grammar.xgrammar import XgrammarBackend
        except ImportError as error:
            raise GrammarError(f"xgrammar can't be loaded: {error}", code="grammar_unavailable") from error
        return XgrammarBackend(vocabulary, eos_ids, layout)
    from trunkline.grammar.llguidance import LlguidanceBackend

    return LlguidanceBackend(vocabulary, eos_ids, layout)
