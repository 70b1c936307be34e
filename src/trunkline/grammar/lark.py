"""Writes grammars in the Lark dialect that llguidance reads: terminals from regular nodes, and rules.

Terminals are matched longest first, with no way back, so a rule may only put two terminals next to each other
if the first can't go on into the second: callers answer for that.
"""

from __future__ import annotations

from trunkline.grammar.protocol import GrammarError
from trunkline.grammar.regex import Both, Chars, Concat, Node, Not, Repeat, Union, is_plain, literal

_VALID = "/(?s:.*)/"
MAX_TEXT = 4 << 20  # characters of a written grammar


class LarkGrammar:
    """Collects definitions; equal terminals are written once."""

    def __init__(self) -> None:
        # Masks hold every token that may come next, also where the text is forced.
        self._lines: list[str] = ['%llguidance {"no_forcing": true}']
        self._terminals: dict[Node, str] = {}
        self._size = 0
        self._rules = 0

    def terminal(self, node: Node) -> str:
        """Name of the terminal for a language."""
        name = self._terminals.get(node)
        if name is None:
            name = self._terminals[node] = f"T{len(self._terminals)}"
            self._add(f"{name}: {expression(node)}")
        return name

    def text(self, text: str) -> str:
        return self.terminal(literal(text))

    def new_rule(self) -> str:
        self._rules += 1
        return f"r{self._rules}"

    def define(
        self, rule: str, options: list[str], *, parametric: bool = False, attributes: str = ""
    ) -> None:
        """`rule: option | option ...`; parametric rules carry a 64-bit state."""
        head = f"{rule}::_" if parametric else f"{rule}{attributes}"
        self._add(f"{head}: " + "\n  | ".join(options))

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


def expression(node: Node) -> str:
    """A terminal's right side."""
    if is_plain(node):
        return f"/{_regex(node)}/"
    match node:
        case Concat(parts):
            runs: list[str] = []
            plain: list[Node] = []
            for part in parts:
                if is_plain(part):
                    plain.append(part)
                    continue
                if plain:
                    runs.append(expression(Concat(tuple(plain))))
                    plain = []
                runs.append(expression(part))
            if plain:
                runs.append(expression(Concat(tuple(plain))))
            return f"({' '.join(runs)})"
        case Union(options):
            return f"({' | '.join(sorted(expression(option) for option in options))})"
        case Both(parts_):
            kept = sorted(expression(part) for part in parts_ if not isinstance(part, Not))
            left_out = sorted(f"~{expression(part.node)}" for part in parts_ if isinstance(part, Not))
            return f"({' & '.join([*(kept or [_VALID]), *left_out])})"
        case Not(inner):  # a complement alone would hold invalid UTF-8
            return f"({_VALID} & ~{expression(inner)})"
        case Repeat(inner, low, high):
            return f"({expression(inner)}){{{low},{'' if high is None else high}}}"
    raise ValueError(f"{node} is no part of a terminal")


def _regex(node: Node) -> str:
    match node:
        case Chars(ranges):
            if not ranges:
                raise ValueError("the empty language has no terminal")
            if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
                return _char(ranges[0][0])
            return "[" + "".join(_char(a) if a == b else f"{_char(a)}-{_char(b)}" for a, b in ranges) + "]"
        case Concat(parts):
            return "".join(_regex(part) for part in parts)
        case Union(options):
            return "(" + "|".join(sorted(_regex(option) for option in options)) + ")"
        case Repeat(inner, low, high):
            count = {(0, None): "*", (1, None): "+", (0, 1): "?"}.get((low, high))
            if count is None:
                count = f"{{{low}}}" if low == high else f"{{{low},{'' if high is None else high}}}"
            body = _regex(inner)
            return (body if isinstance(inner, Chars | Union) else f"({body})") + count
    raise ValueError(f"{node} is no part of a regex")


def _char(code: int) -> str:
    char = chr(code)
    return char if char.isascii() and char.isalnum() else f"\\x{{{code:X}}}"
