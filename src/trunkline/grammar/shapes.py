"""Sets of JSON values in the form that a grammar is written from: a union of shapes, each of one type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trunkline.grammar.facts import Goal
from trunkline.grammar.numbers import NumberRange
from trunkline.grammar.regex import Node


@dataclass(frozen=True)
class Constant:
    """One value."""

    value: Any


@dataclass(frozen=True)
class NumberShape:
    """Numbers of a range but some."""

    range: NumberRange
    excluded: tuple[Any, ...] = ()


@dataclass(frozen=True)
class StringShape:
    """Texts of a language; None: any text, from `low` to `high` code points, in any of its spellings."""

    node: Node | None
    low: int = 0
    high: int | None = None


@dataclass(frozen=True)
class CountedItem:
    """Items beside which others count: a list `contains` from `low` to `high` items of `goal`."""

    goal: Goal
    other: Goal  # what an item is that does not count; the same as any item's goal if there is no upper bound
    low: int
    high: int | None


@dataclass(frozen=True)
class ArrayShape:
    prefix: tuple[Goal, ...]
    rest: Goal | None  # None: no further items
    low: int = 0
    high: int | None = None
    counted: CountedItem | None = None
    distinct: tuple[Any, ...] | None = None  # the items are pairwise different values out of these


@dataclass(frozen=True)
class Property:
    name: str
    goal: Goal
    required: bool


@dataclass(frozen=True)
class NameClass:
    """Properties without a name of their own: those whose names are in a language."""

    names: Node
    goal: Goal


@dataclass(frozen=True)
class ObjectShape:
    properties: tuple[Property, ...]
    classes: tuple[NameClass, ...]
    low: int = 0
    high: int | None = None
    depends: tuple[tuple[str, str], ...] = ()  # with the first property comes the second
    pointer: str = ""  # of minProperties or maxProperties, or of what else bounds the number


@dataclass(frozen=True)
class UnsupportedShape:
    pointer: str
    why: str


Shape = Constant | NumberShape | StringShape | ArrayShape | ObjectShape | UnsupportedShape
