"""A grammar in the making: terminals from regular nodes, and rules over them, for any dialect.

Terminals may be matched longest first, with no way back, so a rule may only put two of them next to each
other if the first can't go on into the second: callers answer for that. Rules are written in what the
dialects share: names, groups, `|`, `*`, `+`, `?`, `{low,high}` and `""`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

from trunkline.grammar.protocol import GrammarError
from trunkline.grammar.regex import Node, literal

MAX_TEXT = 4 << 20  # characters of a written grammar


class GrammarText(Protocol):
    """Collects definitions; equal terminals are written once. `str` gives the text; it starts at `start`."""

    _lines: list[str]
    _terminals: dict[Node, str]
    _size: int
    _rules: int
    _specials: Mapping[str, int]
    _special: re.Pattern[str]
    has_states: bool = True  # else parametric rules are written out, and better avoided

    def __init__(self, specials: Mapping[str, int] | None = None) -> None:
        """`specials`: fixed texts that one special token writes, and its id."""
        self._specials = specials or {}
        marks = sorted(self._specials, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, marks))})" if marks else "(?!)")
        self._lines = []
        self._terminals = {}
        self._size = 0
        self._rules = 0

    def terminal(self, node: Node) -> str:
        """Name of the terminal for a language."""
        name = self._terminals.get(node)
        if name is None:
            name = self._terminals[node] = f"T{len(self._terminals)}"
            self._define_terminal(name, node)
        return name

    def text(self, text: str) -> str:
        """A fixed text that is not empty; special tokens in it as such."""
        parts = [part for part in self._special.split(text) if part]
        return " ".join(
            self._token(self._specials[part]) if part in self._specials else self.terminal(literal(part))
            for part in parts
        )

    def special_at(self, text: str) -> int:
        """Where a text has its first special token; -1: nowhere."""
        found = self._special.search(text)
        return -1 if found is None else found.start()

    def _token(self, token_id: int) -> str:
        """A token by its id. Raises GrammarError where the dialect has no such thing."""

    def new_rule(self) -> str:
        self._rules += 1
        return f"r{self._rules}"

    def define(self, rule: str, options: list[str], *, parametric: bool = False) -> None:
        """`rule: option | option ...`; parametric rules carry a 64-bit state."""

    def define_until(self, rule: str, mark: str) -> None:
        """`rule`: any text up to and with the first `mark`."""

    def _define_terminal(self, name: str, node: Node) -> None: ...

    def _add(self, line: str) -> None:
        self._size += len(line) + 1
        if self._size > MAX_TEXT:
            raise GrammarError(
                f"the grammar grows beyond {MAX_TEXT >> 20} MB of rules", code="grammar_too_complex"
            )
        self._lines.append(line)

    def __str__(self) -> str:
        return "\n".join(self._lines) + "\n"


def conjunction(conditions: list[str]) -> str:
    """`and` takes two."""
    if not conditions:
        return "true"
    found = conditions[-1]
    for condition in reversed(conditions[:-1]):
        found = f"and({condition}, {found})"
    return found


def disjunction(conditions: list[str]) -> str:
    found = conditions[-1] if conditions else "not(true)"
    for condition in reversed(conditions[:-1]):
        found = f"or({condition}, {found})"
    return found
