"""Grammars in the EBNF that xgrammar reads.

It has neither parametric rules nor intersections, complements and lazy terminals. All are written out: rules
by state, and languages by the states of their automata, within a bound.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn

from trunkline.grammar.automaton import Automaton, nullable, splits
from trunkline.grammar.protocol import GrammarError
from trunkline.grammar.regex import (
    ANY,
    EVERYTHING,
    Chars,
    Concat,
    Node,
    Ranges,
    Repeat,
    Union,
    both,
    concat,
    is_plain,
    literal,
    negate,
)
from trunkline.grammar.rules import GrammarText

MAX_STATES = 4_000  # rules that states are written out as, in one grammar
MAX_DERIVATIVES = 100_000

State = int
Condition = Callable[[State], bool]
_STEP = re.compile(r"(r\d+)::(_|0x0|\w+\([^()]*\))")
_CALL = re.compile(r"(\w+)(\(?)")


class _Rule(NamedTuple):
    options: list[str]
    parametric: bool


class EbnfGrammar(GrammarText):
    """Written when all is known, from `start` on."""

    has_states = False

    def __init__(self, specials: Mapping[str, int] | None = None) -> None:
        super().__init__(specials)
        self._rules_of: dict[str, _Rule] = {}
        self._automaton = Automaton(MAX_DERIVATIVES)
        self._states = 0

    def define(self, rule: str, options: list[str], *, parametric: bool = False) -> None:
        self._rules_of[rule] = _Rule(options, parametric)

    def _token(self, token_id: int) -> str:
        mark = next(text for text, known in self._specials.items() if known == token_id)
        raise GrammarError(
            f"the special token {mark[:40]!r} in a grammar needs --grammar-backend llguidance",
            code="unsupported_grammar",
        )

    def define_until(self, rule: str, mark: str) -> None:
        marked = concat([EVERYTHING, literal(mark)])
        self.define(rule, [self.terminal(both([marked, negate(concat([marked, ANY, EVERYTHING]))]))])

    def __str__(self) -> str:
        self._lines.clear()
        used = self._write_rules()
        for node, name in self._terminals.items():
            if name in used:
                self._add(f"{name} ::= {self._expression(name, node)}")
        return super().__str__()

    def _define_terminal(self, name: str, node: Node) -> None:
        """Not yet: it may never be used."""

    # ------------------------------------------------------------------ rules by state
    def _write_rules(self) -> set[str]:
        """Those that can be reached. Returns the names of their terminals."""
        used: set[str] = set()
        todo = [("start", 0)]
        seen = set(todo)
        while todo:
            rule, state = todo.pop()
            options, parametric = self._rules_of[rule]
            if parametric:
                self._count_state()
            written = []
            for option in options:
                body, _, condition = option.partition(" %if ")
                if condition and not _condition(condition)(state):
                    continue
                steps = [(name, _after(state, action)) for name, action in _STEP.findall(body)]
                named = iter(steps)
                body = _STEP.sub(lambda _: _name(*next(named)), body)  # noqa: B023  # used at once
                for name in re.findall(r"\b[rT]\d+\b", body):
                    if name in self._rules_of:
                        steps.append((name, 0))
                    else:
                        used.add(name)
                todo += [step for step in dict.fromkeys(steps) if step not in seen]
                seen.update(steps)
                written.append(body)
            assert written, f"{rule} in state {state:x} has no way on"
            self._add(f"{_name(rule, state) if parametric else rule} ::= {' | '.join(written)}")
        return used

    def _count_state(self) -> None:
        self._states += 1
        if self._states > MAX_STATES:
            raise GrammarError(
                f"written out for xgrammar, which can't count, this takes over {MAX_STATES} rules: use fewer "
                "properties in free order or smaller counts, or --grammar-backend llguidance",
                code="unsupported_grammar",
            )

    # ------------------------------------------------------------------ terminals
    def _expression(self, name: str, node: Node) -> str:
        if is_plain(node):
            return _plain(node)
        match node:
            case Concat(parts):
                return " ".join(self._expression(f"{name}_{at}", part) for at, part in enumerate(parts))
            case Union(options):
                written = [self._expression(f"{name}_{at}", option) for at, option in enumerate(options)]
                return f"({' | '.join(written)})"
            case Repeat(inner, low, high):
                return f"({self._expression(f'{name}_', inner)}){_count(low, high)}"
        return self._by_states(name, node)

    def _by_states(self, name: str, node: Node) -> str:
        """An intersection or complement, as rules for the states of its automaton."""
        moves: dict[Node, dict[Node, list[tuple[int, int]]]] = {}
        sources: dict[Node, set[Node]] = {}
        todo = [node]
        while todo:
            state = todo.pop()
            if state in moves:
                continue
            self._count_state()
            following = moves[state] = {}
            for low, high in splits(state):
                after = self._automaton.derivative(state, low)
                following.setdefault(after, []).append((low, high))
                sources.setdefault(after, set()).add(state)
            todo += following
        useful: dict[Node, str] = {}
        todo = [state for state in moves if nullable(state)]
        while todo:
            state = todo.pop()
            if state not in useful:
                useful[state] = f"{name}s{len(useful)}"
                todo += sources.get(state, ())
        for state, rule in useful.items():
            options = ['""'] if nullable(state) else []
            options += [
                f"{_class(tuple(ranges))} {useful[after]}"
                for after, ranges in moves[state].items()
                if after in useful
            ]
            self._add(f"{rule} ::= {' | '.join(options)}")
        return useful[node]


def _name(rule: str, state: State) -> str:
    return f"{rule}x{state:x}"


def _plain(node: Node) -> str:
    match node:
        case Chars(ranges):
            return _class(ranges)
        case Concat(parts):
            return " ".join(map(_plain, parts)) or '""'
        case Union(options):
            return f"({' | '.join(sorted(map(_plain, options)))})"
        case Repeat(inner, low, high):
            return f"({_plain(inner)}){_count(low, high)}"
    raise ValueError(f"{node} is no part of a terminal")


def _count(low: int, high: int | None) -> str:
    return {(0, None): "*", (1, None): "+", (0, 1): "?"}.get((low, high)) or (
        f"{{{low},{'' if high is None else high}}}"
    )


def _class(ranges: Ranges) -> str:
    """Without surrogates, which are no characters."""
    parts = []
    for low, high in ranges:
        for a, b in ((low, min(high, 0xD7FF)), (max(low, 0xE000), high)):
            if a <= b:
                parts.append(_char(a) if a == b else f"{_char(a)}-{_char(b)}")
    return f"[{''.join(parts)}]"


def _char(code: int) -> str:
    char = chr(code)
    return char if char.isascii() and char.isalnum() else f"\\U{code:08X}"


# ---------------------------------------------------------------------- states of 64 bits, as in llguidance
def _bits(text: str) -> tuple[int, int]:
    """Shift and mask of `[low:high]` or `_`."""
    if text == "_":
        return 0, (1 << 64) - 1
    low, high = (int(bound) for bound in text.strip("[]").split(":"))
    return low, (1 << (high - low)) - 1


def _after(state: State, action: str) -> State:
    if action in ("_", "0x0"):
        return state if action == "_" else 0
    what, argument = action.rstrip(")").split("(")
    if what == "set_bit":
        return state | 1 << int(argument)
    assert what == "incr", action
    shift, mask = _bits(argument)
    return state + (1 << shift) if state >> shift & mask != mask else state


def _condition(text: str) -> Condition:
    found, rest = _parse(text)
    if rest:
        _bad(text)
    return found


def _parse(text: str) -> tuple[Condition, str]:
    head = _CALL.match(text)
    if head is None:
        _bad(text)
    what, rest = head[1], text[head.end() :]
    if what == "true" and not head[2]:
        return lambda state: True, rest
    if what == "not":
        inner, rest = _parse(rest)
        return lambda state: not inner(state), rest[1:]
    if what in ("and", "or"):
        left, rest = _parse(rest)
        right, rest = _parse(rest.removeprefix(", "))
        if what == "and":
            return lambda state: left(state) and right(state), rest[1:]
        return lambda state: left(state) or right(state), rest[1:]
    arguments, _, rest = rest.partition(")")
    return _comparison(what, arguments), rest


def _comparison(what: str, arguments: str) -> Condition:
    first, _, second = arguments.partition(", ")
    if what in ("bit_set", "bit_clear"):
        bit, wanted = int(first), what == "bit_set"
        return lambda state: bool(state >> bit & 1) == wanted
    shift, mask = _bits(first)
    if what == "is_zeros":
        return lambda state: state >> shift & mask == 0
    number = int(second)
    counts = what.startswith("bit_count_")

    def value(state: State) -> int:
        part = state >> shift & mask
        return part.bit_count() if counts else part

    match what.removeprefix("bit_count_"):
        case "ge":
            return lambda state: value(state) >= number
        case "lt":
            return lambda state: value(state) < number
        case "eq":
            return lambda state: value(state) == number
    _bad(what)


def _bad(text: str) -> NoReturn:
    raise ValueError(f"{text!r} is no condition of a rule")
