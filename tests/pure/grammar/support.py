"""Grammars stepped with a real tokenizer."""

from __future__ import annotations

import importlib.util
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trunkline
from trunkline.grammar.json_text import Layout
from trunkline.grammar.llguidance import LlguidanceBackend
from trunkline.grammar.matcher import CompiledGrammar, TokenMatcher
from trunkline.grammar.protocol import GrammarKind, GrammarSpec
from trunkline.text.tokenizer import Tokenizer

MODEL = Path(trunkline.__file__).parent / "assets" / "seedling"


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(MODEL)


HAS_XGRAMMAR = importlib.util.find_spec("xgrammar") is not None
BACKENDS = (
    "llguidance",
    pytest.param("xgrammar", marks=pytest.mark.skipif(not HAS_XGRAMMAR, reason="xgrammar is not installed")),
)


@cache
def backend(spaces: str = "optional") -> LlguidanceBackend:
    return LlguidanceBackend(tokenizer(), [eos_id()], Layout(spaces))


def eos_id() -> int:
    return max(tokenizer().special_ids)


def compile_(kind: GrammarKind, source: Any, *, ordered: bool = False) -> CompiledGrammar:
    text = source if isinstance(source, str) else json.dumps(source)
    return backend().compile(GrammarSpec(kind, text, ordered))


def accepts(grammar: CompiledGrammar, text: str) -> bool:
    """Does the grammar take the text, token by token as the tokenizer splits it, and then the end? Each token
    is looked up in the mask too."""
    matcher = grammar.matcher()
    for token in [*tokenizer().encode(text, add_special_tokens=False), eos_id()]:
        in_mask = token in allowed(matcher)
        assert matcher.accept(token) == in_mask
        if not in_mask:
            return False
    return True


def allowed(matcher: TokenMatcher) -> set[int]:
    row = np.full((tokenizer().num_tokens + 31) // 32 + 2, -1, np.int32)
    matcher.fill_mask(row)
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())


def sample(grammar: CompiledGrammar, seed: int, *, most: int = 400, jump: bool = False) -> str | None:
    """Random allowed tokens until the end; None if there was no end. Towards the end short tokens and the end
    itself are preferred."""
    rng = random.Random(seed)
    matcher = grammar.matcher()
    tokens: list[int] = []
    while len(tokens) < most:
        if jump:
            for token in matcher.forced():
                assert matcher.accept(token)
                tokens.append(token)
        options = sorted(allowed(matcher))
        if eos_id() in options and (len(tokens) > most // 8 or rng.random() < 0.2):
            return tokenizer().decode(tokens)
        if len(tokens) > most // 8:
            closing = [t for t in options if tokenizer().piece(t)[:1] in (b'"', b"}", b"]", b",", b":")]
            ending = [t for t in closing if tokenizer().piece(t) in (b'"', b"}", b"]")]
            options = ending or closing or options
        token = rng.choice(options)
        assert matcher.accept(token)
        if token == eos_id():
            return tokenizer().decode(tokens)
        tokens.append(token)
    return None
