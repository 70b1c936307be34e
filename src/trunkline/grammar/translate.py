"""From a constraint to a grammar in Lark, by kind."""

from __future__ import annotations

import json
from dataclasses import dataclass

from trunkline.grammar.automaton import Automaton
from trunkline.grammar.lark import LarkGrammar
from trunkline.grammar.protocol import GrammarError, GrammarSpec
from trunkline.grammar.regex import Node, chars, concat, literal, match_language, repeat, union

MAX_SOURCE = 4 << 20  # characters


@dataclass(frozen=True)
class Layout:
    """Blanks in JSON: how many may follow `,` and `:`. There are none elsewhere: nobody is trapped in them.

    The default takes both `{"a": 1, "b": 2}` and `{"a":1,"b":2}`; "never" and "always" force more text.
    """

    spaces: str = "optional"

    def after(self, mark: str) -> Node:
        low, high = {"never": (0, 0), "optional": (0, 1), "always": (1, 1)}[self.spaces]
        return concat([literal(mark), repeat(chars((" ", " ")), low, high)])


def lark_of(spec: GrammarSpec, layout: Layout) -> str:
    """Raises GrammarError."""
    if len(spec.source) > MAX_SOURCE:
        raise GrammarError(f"a grammar of over {MAX_SOURCE >> 20} MB", code="grammar_too_complex")
    match spec.kind:
        case "regex":
            return _regular(match_language(spec.source))
        case "choices":
            return _regular(union(literal(choice) for choice in choices(spec.source)))
    raise GrammarError(f"{spec.kind} is not known", code="unsupported_grammar")


def choices(source: str) -> list[str]:
    try:
        found = json.loads(source)
    except ValueError as error:
        raise GrammarError(f"choices are no JSON: {error}", code="invalid_grammar") from error
    if not isinstance(found, list) or not found or not all(isinstance(choice, str) for choice in found):
        raise GrammarError("choices must be a non-empty list of texts", code="invalid_grammar")
    return found


def _regular(node: Node) -> str:
    if Automaton().is_empty(node):
        raise GrammarError("no text matches", code="invalid_grammar")
    grammar = LarkGrammar()
    grammar.define("start", [grammar.terminal(node)])
    return str(grammar)
