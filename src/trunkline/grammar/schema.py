"""A JSON schema as a grammar that accepts its values and nothing else, or an error that says why not.

Steps: `document` reads the schema, `keywords` says what each keyword means, `sets` and `builder` work out the
values of each place as a union of shapes, and this module writes one rule for each such set. Sets that no
finite value belongs to are found first and left out, so that no prefix of a text leads to a dead end.
"""

from __future__ import annotations

import decimal
from collections.abc import Callable
from dataclasses import replace

from trunkline.grammar.automaton import nullable
from trunkline.grammar.document import Document, invalid, refuse, too_complex
from trunkline.grammar.facts import Goal, Literal
from trunkline.grammar.json_text import Layout, constant, free_string, quoted
from trunkline.grammar.members import ObjectWriter
from trunkline.grammar.numbers import spellings
from trunkline.grammar.regex import NOTHING, Node, both, chars, negate, union
from trunkline.grammar.rules import GrammarText, conjunction, disjunction
from trunkline.grammar.sets import InstanceSets
from trunkline.grammar.shapes import (
    ArrayShape,
    Constant,
    CountedItem,
    NumberShape,
    ObjectShape,
    Shape,
    StringShape,
    UnsupportedShape,
)

MAX_GOALS = 5_000  # different sets of values in one schema
MAX_STATES = 2_000  # of an automaton for multiples
MAX_COUNTED = 120  # items that contains counts
MATCHED, OTHERS = "[0:16]", "[16:32]"  # where a rule's state counts the items of `contains`, and the others
MAX_ITEMS = 60_000  # that a parametric rule counts


def add_schema(grammar: GrammarText, source: str, layout: Layout, *, ordered: bool = False) -> str:
    """Write a schema's rules into a grammar; returns the rule of its values. `ordered`: properties in the
    order in which the schema lists them. Raises GrammarError."""
    document = Document(source)
    with decimal.localcontext(prec=2_000):
        sets = InstanceSets(document)
        return _Writer(sets, layout, ordered, grammar).add(sets.goal([Literal("")]))


class _Writer:
    def __init__(self, sets: InstanceSets, layout: Layout, ordered: bool, grammar: GrammarText) -> None:
        self.sets = sets
        self.layout = layout
        self.ordered = ordered
        self.grammar = grammar
        self.comma = self.grammar.terminal(layout.after(","))
        self._rules: dict[Goal, str] = {}
        self.productive: set[Goal] = set()

    def add(self, goal: Goal) -> str:
        goals = self._reachable(goal)
        self._find_productive(goals)
        if goal not in self.productive:
            invalid("", "no value is valid")
        self._rules = {found: self.grammar.new_rule() for found in goals if found in self.productive}
        for found, rule in self._rules.items():
            self._define(found, rule)
        return self._rules[goal]

    def rule(self, goal: Goal) -> str:
        return self._rules[goal]

    # ------------------------------------------------------------------ which sets there are
    def _reachable(self, root: Goal) -> list[Goal]:
        found = {root: None}
        todo = [root]
        while todo:
            for shape in self.sets.shapes(todo.pop()):
                if isinstance(shape, UnsupportedShape):
                    refuse(shape.pointer, shape.why)
                for goal in _parts(shape):
                    if goal not in found:
                        found[goal] = None
                        todo.append(goal)
            if len(found) > MAX_GOALS:
                too_complex("", f"over {MAX_GOALS} different sets of values")
        return list(found)

    def _find_productive(self, goals: list[Goal]) -> None:
        """The least set of goals that finite values meet."""
        users: dict[Goal, list[Goal]] = {}
        for goal in goals:
            for shape in self.sets.shapes(goal):
                for part in _parts(shape):
                    users.setdefault(part, []).append(goal)
        todo = list(goals)
        while todo:
            goal = todo.pop()
            if goal not in self.productive and any(map(self._has_value, self.sets.shapes(goal))):
                self.productive.add(goal)
                todo += users.get(goal, [])

    def _has_value(self, shape: Shape) -> bool:
        match shape:
            case NumberShape():
                node = self._number(shape)
                return node is None or not self.sets.automaton.is_empty(node)
            case ArrayShape():
                return self._array_bounds(shape) is not None
            case ObjectShape():
                return ObjectWriter(self, shape).has_value
            case _:
                return True

    # ------------------------------------------------------------------ rules
    def _define(self, goal: Goal, rule: str) -> None:
        scalars: list[Node] = []
        options: list[str] = []
        for shape in self.sets.shapes(goal):
            match shape:
                case Constant(value):
                    scalars.append(constant(value, self.layout))
                case NumberShape():
                    node = self._number(shape)
                    options.append(self._multiples(shape) if node is None else self.grammar.terminal(node))
                case StringShape(node, low, high):
                    text = free_string(low, high) if node is None else quoted(node)
                    options.append(self.grammar.terminal(text))
                case ArrayShape():
                    options += self._array(shape)
                case ObjectShape():
                    written = ObjectWriter(self, shape)
                    if written.has_value:
                        options.append(written.write())
        if scalars:
            options.append(self.grammar.terminal(union(scalars)))
        self.grammar.define(rule, list(dict.fromkeys(option for option in options if option)))

    def _number(self, shape: NumberShape) -> Node | None:
        """None where the numbers are written digit by digit."""
        node = shape.range.node(exponents=not shape.excluded)
        if node is None:
            return None
        return both([node, negate(union(spellings(decimal.Decimal(value)) for value in shape.excluded))])

    def _multiples(self, shape: NumberShape) -> str:
        """Rules that follow the digits: a state of the bounds, and the number so far modulo the step."""
        step = shape.range.step()
        if step != int(step) or step > MAX_STATES:
            refuse("", f"multipleOf {step} with such bounds")
        size = int(step)
        bounds = replace(shape, range=replace(shape.range, multiple=None, fractional=False))
        start = self._number(bounds)
        assert start is not None
        rules = {(start, 0): self.grammar.new_rule()}
        todo = [(start, 0)]
        while todo:
            state, remainder = todo.pop()
            following: dict[tuple[Node, int], list[str]] = {}
            for char in "-0123456789":
                after = self.sets.automaton.derivative(state, ord(char))
                if after != NOTHING and not self.sets.automaton.is_empty(after):
                    digit = 0 if char == "-" else int(char)
                    following.setdefault((after, (remainder * 10 + digit) % size), []).append(char)
            options = ['""'] if remainder == 0 and nullable(state) and state != start else []
            for key, digits in following.items():
                if key not in rules:
                    if len(rules) >= MAX_STATES:
                        too_complex("", f"multipleOf {step} with such bounds")
                    rules[key] = self.grammar.new_rule()
                    todo.append(key)
                options.append(f"{self.grammar.terminal(chars(*((d, d) for d in digits)))} {rules[key]}")
            self.grammar.define(rules[state, remainder], options)
        return rules[start, 0]

    # ------------------------------------------------------------------ arrays
    def _array_bounds(self, shape: ArrayShape) -> tuple[int, int | None] | None:
        """Least and most items of which there are values; None if there are none."""
        high = shape.high
        for index, goal in enumerate(shape.prefix):
            if goal not in self.productive:
                high = index if high is None else min(high, index)
                break
        if shape.distinct is not None:
            high = len(shape.distinct) if high is None else min(high, len(shape.distinct))
        elif shape.counted is not None:
            return self._counted_bounds(shape, shape.counted, high)
        elif shape.rest not in self.productive:
            high = len(shape.prefix) if high is None else min(high, len(shape.prefix))
        return None if high is not None and shape.low > high else (shape.low, high)

    def _counted_bounds(
        self, shape: ArrayShape, counted: CountedItem, high: int | None
    ) -> tuple[int, int | None] | None:
        most = counted.high if counted.goal in self.productive else 0
        if counted.other not in self.productive:
            high = most if high is None else high if most is None else min(most, high)
        low = max(shape.low, counted.low)
        short = (most is not None and counted.low > most) or (high is not None and low > high)
        return None if short else (low, high)

    def _array(self, shape: ArrayShape) -> list[str]:
        bounds = self._array_bounds(shape)
        if bounds is None:
            return []
        low, high = bounds
        if shape.distinct is not None:
            body = self._distinct_items(shape.distinct, low, high or 0)
        elif shape.counted is not None:
            body = self._counted_items(shape.counted, low, high)
        else:
            body = self._items(shape, low, high)
        return [f"{self.grammar.text('[')} {body} {self.grammar.text(']')}"]

    def _items(self, shape: ArrayShape, low: int, high: int | None) -> str:
        """A rule for the items, perhaps none: first the ones with goals of their own, then the rest."""
        length = len(shape.prefix) if high is None else min(len(shape.prefix), high)
        following = ""
        if (high is None or high > length) and shape.rest in self.productive:
            assert shape.rest is not None
            item = self.rule(shape.rest)
            count = f"{{{max(low - length, 0)},{'' if high is None else high - length}}}"
            following = self.grammar.new_rule()
            if length:
                self.grammar.define(following, [f"({self.comma} {item}){count}"])
            else:
                few, many = max(low - 1, 0), "" if high is None else high - 1
                options = [f"{item} ({self.comma} {item}){{{few},{many}}}" if high != 1 else item]
                self.grammar.define(following, [*options, *(['""'] if low == 0 else [])])
        for index in reversed(range(length)):
            rule = self.grammar.new_rule()
            mark = f"{self.comma} " if index else ""
            option = f"{mark}{self.rule(shape.prefix[index])} {following}".rstrip()
            self.grammar.define(rule, [option, *(['""'] if low <= index else [])])
            following = rule
        return following

    def _distinct_items(self, values: tuple[object, ...], low: int, high: int) -> str:
        """Each value at most once: the rule's state has a bit for each."""
        first, others = self.grammar.new_rule(), self.grammar.new_rule()
        for rule, mark in ((first, ""), (others, f"{self.comma} ")):
            options = [f'"" %if bit_count_ge(_, {low})']
            for index, value in enumerate(values):
                text = self.grammar.terminal(constant(value, self.layout))
                open_ = f"and(bit_clear({index}), bit_count_lt(_, {high}))"
                options.append(f"{mark}{text} {others}::set_bit({index}) %if {open_}")
            self.grammar.define(rule, options, parametric=True)
        return f"{first}::0x0"

    def _counted_items(self, counted: CountedItem, low: int, high: int | None) -> str:
        """The rule's state counts the items that `contains` counts, and apart from them the others."""
        most = counted.low if counted.high is None else counted.high
        if most > MAX_COUNTED or low > MAX_ITEMS or (high or 0) > MAX_ITEMS:
            too_complex("", f"contains counts over {MAX_COUNTED} items, or beside over {MAX_ITEMS}")
        bounded = low > counted.low or high is not None
        ends = [
            f"ge({MATCHED}, {counted.low})",
            _each(range(counted.low, most + 1), lambda n: f"ge({OTHERS}, {max(low - n, 0)})"),
        ]
        # What is still missing has to fit in.
        room = (
            [] if high is None else [_each(range(most), lambda n: _below(high - max(n + 1, counted.low) + 1))]
        )
        other_room = (
            [] if high is None else [_each(range(most + 1), lambda n: _below(high - max(n, counted.low)))]
        )
        first, others = self.grammar.new_rule(), self.grammar.new_rule()
        for rule, mark in ((first, ""), (others, f"{self.comma} ")):
            options = [f'"" %if {conjunction(ends)}']
            if counted.goal in self.productive and most > 0:
                open_ = conjunction([f"lt({MATCHED}, {most})", *room])
                options.append(f"{mark}{self.rule(counted.goal)} {others}::incr({MATCHED}) %if {open_}")
            if counted.other in self.productive:
                after = f"{others}::incr({OTHERS})" if bounded else f"{others}::_"
                options.append(f"{mark}{self.rule(counted.other)} {after} %if {conjunction(other_room)}")
            self.grammar.define(rule, options, parametric=True)
        return f"{first}::0x0"


def _each(numbers: range, condition: Callable[[int], str]) -> str:
    """A condition for each number of items counted so far."""
    return disjunction([f"and(eq({MATCHED}, {number}), {condition(number)})" for number in numbers])


def _below(bound: int) -> str:
    return f"lt({OTHERS}, {bound})" if bound > 0 else "not(true)"


def _parts(shape: Shape) -> list[Goal]:
    match shape:
        case ArrayShape(prefix, rest, _, _, counted, _):
            parts = [*prefix, *([] if rest is None else [rest])]
            return parts if counted is None else [*parts, counted.goal, counted.other]
        case ObjectShape(properties, classes):
            return [*(one.goal for one in properties), *(one.goal for one in classes)]
        case _:
            return []
