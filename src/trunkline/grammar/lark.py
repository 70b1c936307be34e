"""Grammars in the Lark dialect that llguidance reads."""

from __future__ import annotations

from collections.abc import Mapping

from trunkline.grammar.regex import (
    EVERYTHING,
    Both,
    Chars,
    Concat,
    Node,
    Not,
    Repeat,
    Union,
    concat,
    is_plain,
    literal,
)
from trunkline.grammar.rules import GrammarText

_VALID = "/(?s:.*)/"


class LarkGrammar(GrammarText):
    """Parametric rules and lazy terminals are its own."""

    def __init__(self, specials: Mapping[str, int] | None = None) -> None:
        super().__init__(specials)
        # Masks hold every token that may come next, also where the text is forced.
        self._add('%llguidance {"no_forcing": true}')

    def define(self, rule: str, options: list[str], *, parametric: bool = False) -> None:
        self._add(f"{rule}{'::_' if parametric else ''}: " + "\n  | ".join(options))

    def define_until(self, rule: str, mark: str) -> None:
        self._add(f"{rule}[lazy]: {self.terminal(concat([EVERYTHING, literal(mark)]))}")

    def _token(self, token_id: int) -> str:
        return f"<[{token_id}]>"

    def _define_terminal(self, name: str, node: Node) -> None:
        self._add(f"{name}: {expression(node)}")


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
