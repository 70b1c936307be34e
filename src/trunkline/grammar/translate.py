"""From a constraint to a grammar, by kind."""

from __future__ import annotations

import json

from trunkline.grammar.automaton import Automaton
from trunkline.grammar.ebnf import ebnf_grammar
from trunkline.grammar.json_text import Layout
from trunkline.grammar.protocol import GrammarError, GrammarSpec
from trunkline.grammar.regex import Node, literal, match_language, union
from trunkline.grammar.rules import GrammarText
from trunkline.grammar.schema import add_schema
from trunkline.grammar.structural import structural_grammar

MAX_SOURCE = 4 << 20  # characters


def write_grammar(spec: GrammarSpec, layout: Layout, grammar: GrammarText) -> str:
    """The text of `grammar`, which is empty before. Raises GrammarError."""
    if len(spec.source) > MAX_SOURCE:
        raise GrammarError(f"a grammar of over {MAX_SOURCE >> 20} MB", code="grammar_too_complex")
    match spec.kind:
        case "json_schema":
            grammar.define("start", [add_schema(grammar, spec.source, layout, ordered=spec.ordered)])
        case "json_object":
            grammar.define("start", [add_schema(grammar, '{"type": "object"}', layout)])
        case "regex":
            _regular(grammar, match_language(spec.source))
        case "choices":
            _regular(grammar, union(literal(choice) for choice in choices(spec.source)))
        case "ebnf":
            ebnf_grammar(grammar, spec.source)
        case "structural_tag":
            structural_grammar(grammar, spec.source, layout, ordered=spec.ordered)
        case _:
            raise GrammarError(f"{spec.kind} is not known", code="unsupported_grammar")
    return str(grammar)


def choices(source: str) -> list[str]:
    try:
        found = json.loads(source)
    except ValueError as error:
        raise GrammarError(f"choices are no JSON: {error}", code="invalid_grammar") from error
    if not isinstance(found, list) or not found or not all(isinstance(choice, str) for choice in found):
        raise GrammarError("choices must be a non-empty list of texts", code="invalid_grammar")
    if any("\ud800" <= char <= "\udfff" for choice in found for char in choice):
        raise GrammarError("a choice holds a lone surrogate", code="invalid_grammar")
    return found


def _regular(grammar: GrammarText, node: Node) -> None:
    if Automaton().is_empty(node):
        raise GrammarError("no text matches", code="invalid_grammar")
    grammar.define("start", [grammar.terminal(node)])
