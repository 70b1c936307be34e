"""Merges the facts of a branch into shapes, type by type."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from itertools import product
from typing import TYPE_CHECKING, Any, TypeVar

from trunkline.grammar.document import refuse, too_complex
from trunkline.grammar.facts import (
    NUMERIC,
    Bound,
    Contains,
    Depends,
    Excluded,
    Fact,
    Goal,
    Has,
    Items,
    Literal,
    Matches,
    Members,
    MultipleOf,
    Names,
    Size,
    Unevaluated,
    Unique,
    Unsupported,
)
from trunkline.grammar.instance import identity
from trunkline.grammar.numbers import NumberRange
from trunkline.grammar.regex import ANY, EVERYTHING, Node, both, literal, negate, repeat, union
from trunkline.grammar.shapes import (
    ArrayShape,
    Constant,
    CountedItem,
    NameClass,
    NumberShape,
    ObjectShape,
    Property,
    Shape,
    StringShape,
    UnsupportedShape,
)

if TYPE_CHECKING:
    from trunkline.grammar.sets import InstanceSets

MAX_PATTERNS = 5  # patternProperties that apply to one object
MAX_DISTINCT = 48  # values of which a uniqueItems array is made

F = TypeVar("F")


def shapes_of(sets: InstanceSets, types: frozenset[str], facts: tuple[Fact, ...]) -> list[Shape]:
    """The values of `types` for which all facts hold."""
    shapes: list[Shape] = []
    excluded = [value for fact in _all(facts, Excluded) for value in fact.values]
    if "null" in types and None not in excluded:
        shapes.append(Constant(None))
    if "boolean" in types:
        never = {identity(value) for value in excluded}
        shapes += [Constant(value) for value in (True, False) if identity(value) not in never]
    if types & NUMERIC:
        shapes += _number(types, facts, excluded)
    for kind, build in (("string", _string), ("array", _array), ("object", _object)):
        if kind in types:
            blocked = _blocked(kind, facts)
            shapes += build(sets, facts, excluded, blocked)
    return shapes


def _all(facts: Sequence[Fact], kind: type[F]) -> list[F]:
    return [fact for fact in facts if isinstance(fact, kind)]


def _blocked(kind: str, facts: tuple[Fact, ...]) -> UnsupportedShape | None:
    for fact in _all(facts, Unsupported):
        if fact.kind == kind:
            return UnsupportedShape(fact.pointer, f"{fact.why} can't be enforced here")
    return None


def _sizes(kind: str, facts: tuple[Fact, ...]) -> tuple[int, int | None]:
    found = [fact for fact in _all(facts, Size) if fact.kind == kind]
    low = max((fact.low for fact in found), default=0)
    return low, min((fact.high for fact in found if fact.high is not None), default=None)


def _number(types: frozenset[str], facts: tuple[Fact, ...], excluded: list[Any]) -> list[Shape]:
    bounds = NumberRange("integer" in types, "fraction" in types)
    for fact in facts:
        match fact:
            case Bound(value, True, is_open):
                bounds = bounds.below(value, is_open=is_open)
            case Bound(value, False, is_open):
                bounds = bounds.above(value, is_open=is_open)
            case MultipleOf(value):
                bounds = bounds.times(value)
    if bounds.is_empty:
        return []
    for kind in types & NUMERIC:
        blocked = _blocked(kind, facts)
        if blocked is not None:
            return [blocked]
    never = [v for v in excluded if isinstance(v, int | Decimal) and not isinstance(v, bool)]
    return [NumberShape(bounds, tuple(never))]


def _string(
    sets: InstanceSets, facts: tuple[Fact, ...], excluded: list[Any], blocked: UnsupportedShape | None
) -> list[Shape]:
    low, high = _sizes("string", facts)
    if high is not None and low > high:
        return []
    never = [literal(value) for value in excluded if isinstance(value, str)]
    node = both([*(fact.node for fact in _all(facts, Matches)), negate(union(never))])
    if node == EVERYTHING:
        return [blocked or StringShape(None, low, high)]
    node = both([node, repeat(ANY, low, high)])
    if sets.automaton.is_empty(node):
        return []
    return [blocked or StringShape(node)]


# ------------------------------------------------------------------ arrays
def _array(
    sets: InstanceSets, facts: tuple[Fact, ...], excluded: list[Any], blocked: UnsupportedShape | None
) -> list[Shape]:
    low, high = _sizes("array", facts)
    low = max(low, 1) if [] in excluded else low
    if high is not None and low > high:
        return []
    pointer = next((fact.pointer for fact in _all(facts, Excluded)), "")
    if any(isinstance(value, list) and value for value in excluded):
        return [UnsupportedShape(pointer, "leaving out an array")]
    if blocked is not None:
        return [blocked]
    found = _all(facts, Items)
    length = max((len(fact.prefix) for fact in found), default=0)
    goals = [_item_goal(sets, facts, found, index) for index in range(length + 1)]
    prefix, rest = tuple(goals[:length]), goals[length]
    contains = [fact for fact in _all(facts, Contains) if fact.low > 0 or fact.high is not None]
    unique = _all(facts, Unique)
    if unique and (high is None or high > 1):
        return _distinct(sets, prefix, rest, low, high, unique[0].pointer, contains)
    if not contains:
        return [ArrayShape(prefix, rest, low, high)]
    if len(contains) > 1 or prefix:
        refuse(contains[0].pointer, "contains beside another one or beside prefixItems")
    return [_containing(sets, rest, low, high, contains[0])]


def _item_goal(sets: InstanceSets, facts: tuple[Fact, ...], found: list[Items], index: int) -> Goal:
    literals = []
    for fact in found:
        if index < len(fact.prefix):
            literals.append(fact.prefix[index])
        elif fact.rest is not None:
            literals.append(fact.rest)
    for owner in (fact for fact in _all(facts, Unevaluated) if fact.kind == "array"):
        if any(owner.owner in fact.scopes for fact in _all(facts, Contains)):
            refuse(owner.goal.pointer, "unevaluatedItems beside contains")
        inside = [fact for fact in found if owner.owner in fact.scopes]
        if not any(index < len(fact.prefix) or fact.rest is not None for fact in inside):
            literals.append(owner.goal)
    return sets.goal(literals)


def _containing(sets: InstanceSets, item: Goal, low: int, high: int | None, fact: Contains) -> Shape:
    counted = sets.goal([*item, fact.item])
    other = (
        item if fact.high is None else sets.goal([*item, Literal(fact.item.pointer, not fact.item.positive)])
    )
    return ArrayShape((), item, low, high, CountedItem(counted, other, fact.low, fact.high))


def _distinct(
    sets: InstanceSets,
    prefix: tuple[Goal, ...],
    rest: Goal,
    low: int,
    high: int | None,
    pointer: str,
    contains: list[Contains],
) -> list[Shape]:
    if prefix and sets.is_empty(rest) and _disjoint(sets, prefix):
        return [ArrayShape(prefix, rest, low, high)]  # a tuple of values that can't be equal
    values = None if prefix or contains else sets.finite(rest, MAX_DISTINCT)
    if values is None:
        refuse(
            pointer, f"uniqueItems over more than {MAX_DISTINCT} values, or beside prefixItems or contains"
        )
    if low > len(values):
        return []
    return [ArrayShape((), rest, low, high, distinct=tuple(values))]


def _disjoint(sets: InstanceSets, goals: tuple[Goal, ...]) -> bool:
    return all(
        sets.is_empty(goal | other) for index, goal in enumerate(goals) for other in goals[index + 1 :]
    )


# ------------------------------------------------------------------ objects
def _object(
    sets: InstanceSets, facts: tuple[Fact, ...], excluded: list[Any], blocked: UnsupportedShape | None
) -> list[Shape]:
    low, high = _sizes("object", facts)
    low = max(low, 1) if {} in excluded else low
    required = {fact.name: None for fact in _all(facts, Has) if fact.present}
    forbidden = {fact.name for fact in _all(facts, Has) if not fact.present}
    depends = [(fact.name, needed) for fact in _all(facts, Depends) for needed in fact.needed]
    if forbidden & set(required) or (high is not None and max(low, len(required)) > high):
        return []
    pointer = next((fact.pointer for fact in _all(facts, Excluded)), "")
    if any(isinstance(value, dict) and value for value in excluded):
        return [UnsupportedShape(pointer, "leaving out an object")]
    names: dict[str, None] = {}
    for fact in _all(facts, Members):
        names |= {name: None for name, _ in fact.named}
    names |= required | dict.fromkeys(sorted(forbidden))
    names |= {name: None for pair in depends for name in pair}
    properties = []
    for name in names:
        goal = None if name in forbidden else _named_goal(sets, facts, name)
        if goal is not None:
            properties.append(Property(name, goal, name in required))
        elif name in required:
            return []
    if blocked is not None:
        return [blocked]
    classes = _classes(sets, facts, names)
    place = next((fact.pointer for fact in _all(facts, Size) if fact.kind == "object"), pointer)
    return [ObjectShape(tuple(properties), tuple(classes), low, high, tuple(dict.fromkeys(depends)), place)]


def _named_goal(sets: InstanceSets, facts: tuple[Fact, ...], name: str) -> Goal | None:
    """What the value of property `name` has to meet; None if there can't be one of this name."""
    if not all(
        sets.validator.accepts(fact.name.pointer, name) == fact.name.positive for fact in _all(facts, Names)
    ):
        return None
    literals: list[Literal] = []
    for fact in _all(facts, Members):
        literals += [goal for own, goal in fact.named if own == name]
        literals += [goal for node, goal in fact.patterns if sets.automaton.accepts(node, name)]
        if fact.others is not None and not _covers(sets, fact, name):
            literals.append(fact.others)
    for owner in (fact for fact in _all(facts, Unevaluated) if fact.kind == "object"):
        inside = [fact for fact in _all(facts, Members) if owner.owner in fact.scopes]
        if not any(fact.others is not None or _covers(sets, fact, name) for fact in inside):
            literals.append(owner.goal)
    return sets.goal(literals)


def _covers(sets: InstanceSets, fact: Members, name: str) -> bool:
    return any(own == name for own, _ in fact.named) or any(
        sets.automaton.accepts(node, name) for node, _ in fact.patterns
    )


def _classes(sets: InstanceSets, facts: tuple[Fact, ...], named: dict[str, None]) -> list[NameClass]:
    """Other names, divided by the patterns that they match."""
    members = _all(facts, Members)
    patterns = list(dict.fromkeys(node for fact in members for node, _ in fact.patterns))
    if len(patterns) > MAX_PATTERNS:
        too_complex("", f"over {MAX_PATTERNS} patternProperties on one object")
    base = both([_names(sets, facts), negate(union(literal(name) for name in named))])
    classes = []
    for chosen in product((True, False), repeat=len(patterns)):
        matching = {node for node, matches in zip(patterns, chosen, strict=True) if matches}
        literals: list[Literal] = []
        for fact in members:
            own = [goal for node, goal in fact.patterns if node in matching]
            literals += own or ([fact.others] if fact.others is not None else [])
        for owner in (fact for fact in _all(facts, Unevaluated) if fact.kind == "object"):
            inside = [fact for fact in members if owner.owner in fact.scopes]
            if not any(f.others is not None or any(n in matching for n, _ in f.patterns) for f in inside):
                literals.append(owner.goal)
        goal = sets.goal(literals)
        if any(sets.document.at(one.pointer) is False and one.positive for one in goal):
            continue
        names = both([base, *(n if n in matching else negate(n) for n in patterns)])
        if not sets.automaton.is_empty(names):
            classes.append(NameClass(names, goal))
    return classes


def _names(sets: InstanceSets, facts: tuple[Fact, ...]) -> Node:
    """Texts that every propertyNames takes."""
    goal = sets.goal([fact.name for fact in _all(facts, Names)])
    if not goal:
        return EVERYTHING
    options: list[Node] = []
    for shape in sets.shapes(goal):
        match shape:
            case Constant(value) if isinstance(value, str):
                options.append(literal(value))
            case StringShape(None, low, high):
                options.append(repeat(ANY, low, high))
            case StringShape(node, _, _) if node is not None:
                options.append(node)
            case UnsupportedShape(pointer, why):
                refuse(pointer, why)
    return union(options)
