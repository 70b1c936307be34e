"""Context-free grammars in the EBNF that xgrammar and llama.cpp read: `root ::= "a" [0-9]+ | rule?`.

A grammar without recursion is one regular language, and becomes one terminal. With recursion every terminal
is a single character: longer ones, matched longest first, would cut a text where the grammar does not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

from trunkline.grammar.automaton import Automaton
from trunkline.grammar.protocol import GrammarError
from trunkline.grammar.regex import (
    EMPTY,
    MAX_NESTING,
    NOTHING,
    Chars,
    Concat,
    Node,
    Repeat,
    Union,
    concat,
    literal,
    parse,
    repeat,
    union,
)
from trunkline.grammar.rules import GrammarText

MAX_EXPANDED = 200_000  # nodes of a grammar without recursion, written out
NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")

_WIDE = re.compile(r"\\(?:U([0-9a-fA-F]{8})|.)", re.DOTALL)  # an escape


@dataclass(frozen=True, slots=True)
class Reference:
    name: str


@dataclass(frozen=True, slots=True)
class Sequence:
    parts: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    options: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Times:
    part: Expression
    low: int
    high: int | None


Expression = Node | Reference | Sequence | Choice | Times


def ebnf_grammar(grammar: GrammarText, source: str, root: str = "root") -> None:
    """Write the rules of an EBNF text. Raises GrammarError naming the line."""
    rules = _Parser(source).parse()
    if root not in rules:
        raise GrammarError(f"the grammar has no rule {root!r}", code="invalid_grammar")
    for name, expression in rules.items():
        for used in _references(expression):
            if used not in rules:
                raise GrammarError(
                    f"rule {name!r} uses {used!r}, which is not defined", code="invalid_grammar"
                )
    productive = _productive(rules)
    if root not in productive:
        raise GrammarError("no text matches", code="invalid_grammar")
    if _is_recursive(rules, root):
        _Characters(grammar, rules, productive).write(root)
    else:
        node = _Expander(rules).expand(rules[root])
        if Automaton().is_empty(node):
            raise GrammarError("no text matches", code="invalid_grammar")
        grammar.define("start", [grammar.terminal(node)])


def _references(expression: Expression) -> list[str]:
    match expression:
        case Reference(name):
            return [name]
        case Sequence(parts) | Choice(parts):
            return [name for part in parts for name in _references(part)]
        case Times(part, _, high):
            return _references(part) if high != 0 else []
        case _:
            return []


def _is_recursive(rules: dict[str, Expression], root: str) -> bool:
    """Does any rule that the root needs use itself?"""
    done: set[str] = set()
    path: dict[str, list[str]] = {}
    stack = [root]
    while stack:
        name = stack[-1]
        if name in done:
            stack.pop()
            continue
        if name not in path:
            path[name] = list(dict.fromkeys(_references(rules[name])))
        following = [used for used in path[name] if used not in done]
        if not following:
            done.add(name)
            del path[name]
            stack.pop()
        elif following[0] in path:
            return True
        else:
            stack.append(following[0])
    return False


def _productive(rules: dict[str, Expression]) -> frozenset[str]:
    """Rules that finite texts match."""
    found: set[str] = set()
    while True:
        more = {
            name for name, expression in rules.items() if name not in found and _yields(expression, found)
        }
        if not more:
            return frozenset(found)
        found |= more


def _yields(expression: Expression, productive: set[str] | frozenset[str]) -> bool:
    match expression:
        case Reference(name):
            return name in productive
        case Sequence(parts):
            return all(_yields(part, productive) for part in parts)
        case Choice(options):
            return any(_yields(option, productive) for option in options)
        case Times(part, low, _):
            return low == 0 or _yields(part, productive)
        case _:
            return expression != NOTHING


class _Expander:
    """Writes out a grammar without recursion."""

    def __init__(self, rules: dict[str, Expression]) -> None:
        self._rules = rules
        self._left = MAX_EXPANDED
        self._known: dict[str, tuple[Node, int]] = {}

    def expand(self, expression: Expression) -> Node:
        self._spend(1)
        match expression:
            case Reference(name):
                if name not in self._known:
                    before = self._left
                    node = self.expand(self._rules[name])
                    self._known[name] = (node, before - self._left)
                else:
                    self._spend(self._known[name][1])
                return self._known[name][0]
            case Sequence(parts):
                return concat([self.expand(part) for part in parts])
            case Choice(options):
                return union([self.expand(option) for option in options])
            case Times(part, low, high):
                return repeat(self.expand(part), low, high)
            case _:
                return expression

    def _spend(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise GrammarError("the grammar is too large when written out", code="grammar_too_complex")


class _Characters:
    """Writes rules over single characters."""

    def __init__(
        self, grammar: GrammarText, rules: dict[str, Expression], productive: frozenset[str]
    ) -> None:
        self._grammar = grammar
        self._rules = rules
        self._productive = productive
        self._names: dict[str, str] = {}

    def write(self, root: str) -> None:
        todo = [root]
        self._names[root] = "start"
        while todo:
            name = todo.pop()
            for used in _references(self._rules[name]):
                if used not in self._names and used in self._productive:
                    self._names[used] = self._grammar.new_rule()
                    todo.append(used)
            self._grammar.define(self._names[name], [self._text(self._rules[name])])

    def _text(self, expression: Expression) -> str:
        match expression:
            case Reference(name):
                return self._names[name]
            case Sequence(parts):
                return " ".join(map(self._text, parts)) or '""'
            case Choice(options):
                kept = [self._text(option) for option in options if _yields(option, self._productive)]
                return f"({' | '.join(kept)})"
            case Times(part, low, high):
                if not _yields(part, self._productive):
                    return '""'
                return f"({self._text(part)}){{{low},{'' if high is None else high}}}"
            case Chars():
                return self._grammar.terminal(expression)
            case Concat(nodes):
                return " ".join(map(self._text, nodes)) or '""'
            case Union(nodes_):
                return f"({' | '.join(sorted(map(self._text, nodes_)))})"
            case Repeat(node, low, high):
                return f"({self._text(node)}){{{low},{'' if high is None else high}}}"
        raise ValueError(f"{expression} is no part of a grammar")


def _spelled_wide(escape: re.Match[str]) -> str:
    return _code(escape[1]) if escape[1] else escape[0]


def _code(digits: str) -> str:
    return f"\\u{{{digits.lstrip('0') or '0'}}}"


class _Parser:
    def __init__(self, source: str) -> None:
        self._text = source
        self._at = 0
        self._depth = 0

    def parse(self) -> dict[str, Expression]:
        rules: dict[str, Expression] = {}
        self._blanks()
        while self._at < len(self._text):
            name = self._name()
            self._blanks()
            if not self._take("::="):
                self._fail("expected ::=")
            if name in rules:
                self._fail(f"rule {name!r} is defined twice")
            rules[name] = self._choice()
            self._blanks()
        return rules

    def _fail(self, what: str) -> NoReturn:
        line = self._text.count("\n", 0, self._at) + 1
        raise GrammarError(f"{what} in line {line} of the grammar", code="invalid_grammar", pointer=str(line))

    def _take(self, text: str) -> bool:
        if self._text.startswith(text, self._at):
            self._at += len(text)
            return True
        return False

    def _blanks(self) -> None:
        while self._at < len(self._text):
            if self._text[self._at] == "#":
                end = self._text.find("\n", self._at)
                self._at = len(self._text) if end < 0 else end
            elif self._text[self._at].isspace():
                self._at += 1
            else:
                return

    def _name(self) -> str:
        start = self._at
        while self._at < len(self._text) and self._text[self._at] in NAME:
            self._at += 1
        if start == self._at:
            self._fail("expected the name of a rule")
        return self._text[start : self._at]

    def _choice(self) -> Expression:
        self._depth += 1
        if self._depth > MAX_NESTING:
            raise GrammarError("groups are nested too deep", code="grammar_too_complex")
        options = [self._sequence()]
        self._blanks()
        while self._take("|"):
            options.append(self._sequence())
            self._blanks()
        self._depth -= 1
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def _sequence(self) -> Expression:
        parts: list[Expression] = []
        while True:
            self._blanks()
            if self._at >= len(self._text) or self._text[self._at] in "|)" or self._at_rule():
                return parts[0] if len(parts) == 1 else Sequence(tuple(parts))
            part = self._atom()
            while (bounds := self._bounds()) is not None:
                part = Times(part, *bounds)
            parts.append(part)

    def _at_rule(self) -> bool:
        """Does the next rule start here?"""
        at = self._at
        while at < len(self._text) and self._text[at] in NAME:
            at += 1
        if at == self._at:
            return False
        while at < len(self._text) and self._text[at] in " \t":
            at += 1
        return self._text.startswith("::=", at)

    def _atom(self) -> Expression:
        if self._take("("):
            inner = self._choice()
            self._blanks()
            if not self._take(")"):
                self._fail("missing )")
            return inner
        if self._take('"'):
            return self._quoted()
        if self._text[self._at] == "[":
            return self._class()
        if self._take("."):
            return parse(r"[^\n]")
        return Reference(self._name())

    def _quoted(self) -> Node:
        parts: list[Node] = []
        while not self._take('"'):
            start = self._at
            if start >= len(self._text) or self._text[start] == "\n":
                self._fail('missing "')
            if self._text[start] != "\\":
                parts.append(literal(self._text[start]))
                self._at += 1
                continue
            self._at += {"x": 4, "u": 6, "U": 10}.get(self._text[start + 1 : start + 2], 2)
            escape = self._text[start : self._at]
            try:
                code = _code(escape[2:]) if escape[1:2] in ("x", "u", "U") else escape
                parts.append(literal('"') if escape == '\\"' else parse(code))
            except GrammarError:
                self._fail(f"bad escape {escape}")
        return concat(parts) if parts else EMPTY

    def _class(self) -> Node:
        start = self._at
        self._at += 1
        while self._at < len(self._text) and self._text[self._at] != "]":
            self._at += 2 if self._text[self._at] == "\\" else 1
        self._at += 1
        try:
            return parse(_WIDE.sub(_spelled_wide, self._text[start : self._at]))
        except GrammarError as error:
            self._fail(f"bad class {self._text[start : self._at][:40]}: {error.message}")

    def _bounds(self) -> tuple[int, int | None] | None:
        for mark, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(mark):
                return bounds
        if not self._take("{"):
            return None
        end = self._text.find("}", self._at)
        low, comma, high = (part.strip() for part in self._text[self._at : max(end, 0)].partition(","))
        if not low.isdecimal() or (high and not high.isdecimal()) or len(low + high) > 8:
            self._fail("bad repetition")
        self._at = end + 1
        upper = int(high) if high else None if comma else int(low)
        if upper is not None and upper < int(low):
            self._fail("numbers out of order in a repetition")
        return int(low), upper
