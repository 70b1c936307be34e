"""From goals to shapes: which values meet all of some literals, as a union of shapes.

A branch holds the facts found so far and what is still to be looked at; a keyword with several options splits
it. Options that contradict the facts are dropped at once, so that most products never come to be.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from trunkline.grammar.automaton import Automaton
from trunkline.grammar.builder import shapes_of
from trunkline.grammar.document import Document, too_complex
from trunkline.grammar.facts import TYPES, Fact, Goal, Literal, Option, Scopes, Values
from trunkline.grammar.instance import InstanceValidator, identity
from trunkline.grammar.keywords import Choice, negative_choice, positive_choices, property_conditions
from trunkline.grammar.protocol import GrammarError
from trunkline.grammar.shapes import ArrayShape, Constant, NumberShape, ObjectShape, Shape, StringShape

MAX_BRANCHES = 2_000  # of one goal
MAX_STEPS = 200_000  # literals looked at, for a whole schema
MAX_OVERLAP_DEPTH = 6  # levels of required properties that are compared to tell options of oneOf apart


@dataclass
class _Branch:
    types: frozenset[str] = TYPES
    facts: tuple[Fact, ...] = ()
    todo: tuple[tuple[Literal, Scopes], ...] = ()
    seen: frozenset[tuple[Literal, Scopes]] = frozenset()
    choices: tuple[Choice, ...] = ()

    def taking(self, option: Option) -> _Branch | None:
        types = self.types & option.types
        if not types:
            return None
        todo = (*self.todo, *((literal, option.scopes) for literal in option.literals))
        return _Branch(types, self.facts + option.facts, todo, self.seen, self.choices)


@dataclass
class InstanceSets:
    """The shapes of goals over one document, remembered."""

    document: Document
    automaton: Automaton = field(default_factory=Automaton)

    def __post_init__(self) -> None:
        self.validator = InstanceValidator(self.document, self.automaton)
        self._shapes: dict[Goal, list[Shape]] = {}
        self._empty: dict[Goal, bool] = {}
        self._steps = 0

    def goal(self, literals: Iterable[Literal]) -> Goal:
        """Equal goals for what is easily seen to be equal: no literals that any value meets, no bare $ref."""
        found = set()
        for literal in literals:
            schema = self.document.at(literal.pointer)
            hops = 0
            while isinstance(schema, dict) and set(schema) == {"$ref"} and hops < 100:
                literal = Literal(self.document.target(literal.pointer), literal.positive)
                schema = self.document.at(literal.pointer)
                hops += 1
            if not (literal.positive and schema in (True, {})):
                found.add(literal)
        return frozenset(found)

    def shapes(self, goal: Goal) -> list[Shape]:
        """Raises GrammarError for a goal with too many branches, or with keywords that nothing expresses."""
        found = self._shapes.get(goal)
        if found is None:
            found = self._shapes[goal] = self._expand(goal)
        return found

    def is_empty(self, goal: Goal, depth: int = 0) -> bool:
        """Is it certain that no value meets the goal? Looks at required parts a few levels deep."""
        if depth > MAX_OVERLAP_DEPTH:
            return False
        known = self._empty.get(goal)
        if known is None:
            self._empty[goal] = False  # what requires itself is left to the grammar
            try:
                known = all(self._shape_is_empty(shape, depth) for shape in self.shapes(goal))
            except GrammarError as error:
                if error.code == "grammar_too_complex":
                    raise
                known = False
            if depth == 0 or known:
                self._empty[goal] = known
            else:
                del self._empty[goal]
        return known

    def _shape_is_empty(self, shape: Shape, depth: int) -> bool:
        match shape:
            case ObjectShape():
                return any(p.required and self.is_empty(p.goal, depth + 1) for p in shape.properties)
            case ArrayShape():
                return any(self.is_empty(goal, depth + 1) for goal in shape.prefix[: shape.low]) or (
                    shape.counted is not None
                    and shape.counted.low > 0
                    and self.is_empty(shape.counted.goal, depth + 1)
                )
            case _:
                return False

    # ------------------------------------------------------------------ branches
    def _expand(self, goal: Goal) -> list[Shape]:
        todo = [_Branch(todo=tuple((literal, frozenset()) for literal in sorted(goal, key=_order)))]
        shapes: list[Shape] = []
        values: dict[object, Any] = {}
        count = 0
        while todo:
            branch = todo.pop()
            count += 1
            if count > MAX_BRANCHES:
                pointer = min((literal.pointer for literal in goal), default="")
                too_complex(pointer, f"over {MAX_BRANCHES} combinations of anyOf, oneOf, not and if")
            if branch.todo:
                self._look(branch)
            if listed := [fact for fact in branch.facts if isinstance(fact, Values)]:
                # Values that are listed are tried one by one, against the whole goal.
                values |= {
                    identity(value): value for value in min(listed, key=lambda v: len(v.values)).values
                }
            elif branch.choices:
                todo += self._split(branch)
            else:
                shapes += shapes_of(self, branch.types, branch.facts)
        constants = [Constant(value) for value in values.values() if self._meets(goal, value)]
        return list(dict.fromkeys(_hashable(shapes))) + constants

    def _meets(self, goal: Goal, value: Any) -> bool:
        return all(self.validator.accepts(one.pointer, value) == one.positive for one in goal)

    def _look(self, branch: _Branch) -> None:
        """Turn what is to be looked at into choices, taking at once those that leave none."""
        while branch.todo:
            (literal, scopes), *rest = branch.todo
            branch.todo = tuple(rest)
            if (literal, scopes) in branch.seen:
                continue
            self._steps += 1
            if self._steps > MAX_STEPS:
                too_complex(literal.pointer, "the schema's keywords combine in too many ways")
            branch.seen |= {(literal, scopes)}
            for choice in self._choices(literal, scopes):
                possible = [option for option in choice if option.types & branch.types]
                if len(possible) == 1:
                    taken = branch.taking(possible[0])
                    assert taken is not None
                    branch.types, branch.facts, branch.todo = taken.types, taken.facts, taken.todo
                else:
                    branch.choices = (*branch.choices, possible)
                if not possible:
                    branch.todo = ()
                    return

    def _choices(self, literal: Literal, scopes: Scopes) -> Iterable[Choice]:
        if not literal.positive:
            return [negative_choice(self.document, literal.pointer)]
        schema = self.document.at(literal.pointer)
        if isinstance(schema, dict) and ("unevaluatedProperties" in schema or "unevaluatedItems" in schema):
            scopes = scopes | {literal.pointer}
        found = list(positive_choices(self.document, literal.pointer, scopes))
        if isinstance(schema, dict):
            if "oneOf" in schema:
                found.append(self._one_of(f"{literal.pointer}/oneOf", len(schema["oneOf"]), scopes))
            for word in ("dependentSchemas", "dependencies"):
                if word in schema:
                    found += property_conditions(literal.pointer, schema, word, scopes)
        return found

    def _one_of(self, place: str, count: int, scopes: Scopes) -> Choice:
        """Each option, and the negation of those that overlap with it."""
        options = [Literal(f"{place}/{index}") for index in range(count)]
        overlapping: dict[Literal, list[Literal]] = {option: [] for option in options}
        if count <= MAX_BRANCHES // 10:
            for index, one in enumerate(options):
                for other in options[index + 1 :]:
                    if not self.is_empty(self.goal((one, other))):
                        overlapping[one].append(other)
                        overlapping[other].append(one)
        else:
            too_complex(place, f"oneOf over {count} options")
        return [
            Option(literals=(one, *(Literal(other.pointer, False) for other in others)), scopes=scopes)
            for one, others in overlapping.items()
        ]

    def _split(self, branch: _Branch) -> list[_Branch]:
        """Decide the choice with the fewest options."""
        choices = [[option for option in choice if option.types & branch.types] for choice in branch.choices]
        index = min(range(len(choices)), key=lambda i: len(choices[i]))
        rest = tuple(choice for i, choice in enumerate(choices) if i != index)
        branches = []
        for option in choices[index]:
            following = _Branch(branch.types, branch.facts, branch.todo, branch.seen, rest).taking(option)
            if following is not None:
                branches.append(following)
        return branches

    # ------------------------------------------------------------------ finite sets
    def finite(self, goal: Goal, limit: int) -> list[Any] | None:
        """All values of a goal; None if they are more than `limit`, or not seen to be finite."""
        values: dict[object, Any] = {}
        for shape in self.shapes(goal):
            found = self._listed(shape, limit)
            if found is None:
                return None
            values |= {identity(value): value for value in found}
        return list(values.values()) if len(values) <= limit else None

    def _listed(self, shape: Shape, limit: int) -> list[Any] | None:
        match shape:
            case Constant(value):
                return [value]
            case NumberShape(bounds, excluded) if not bounds.fractional and bounds.multiple is None:
                low, high = bounds.integers()
                if low is None or high is None or high - low > 2 * limit:
                    return None
                never = {identity(value) for value in excluded}
                return [value for value in range(low, high + 1) if identity(value) not in never]
            case StringShape(node, 0, None) if node is not None:
                return self.automaton.words(node, limit)
        return None


def _order(literal: Literal) -> tuple[str, bool]:
    return literal.pointer, literal.positive


def _hashable(shapes: list[Shape]) -> list[Shape]:
    """`Constant` of a list or an object has no hash; those come one by one anyway."""
    return [
        shape
        for shape in shapes
        if not isinstance(shape, Constant) or not isinstance(shape.value, list | dict)
    ]
