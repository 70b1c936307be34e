"""What a schema says, one statement at a time: each bounds the values of one type and leaves others alone."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from trunkline.grammar.regex import Node

NUMERIC = frozenset({"integer", "fraction"})  # numbers, told apart: integral ones and the others
TYPES = frozenset({"null", "boolean", "string", "array", "object"}) | NUMERIC


@dataclass(frozen=True, slots=True)
class Literal:
    """A value is, or is not, valid at a place of the document."""

    pointer: str
    positive: bool = True


Goal = frozenset[Literal]  # all of them hold; the empty goal is any value
Scopes = frozenset[str]  # schemas with unevaluated... to which a statement counts as evaluated


@dataclass(frozen=True, slots=True)
class Values:
    """One of these values."""

    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Excluded:
    values: tuple[Any, ...]
    pointer: str


@dataclass(frozen=True, slots=True)
class Bound:
    """A number is above (`upper`: below) a value, or equal unless `is_open`."""

    value: Decimal
    upper: bool
    is_open: bool


@dataclass(frozen=True, slots=True)
class MultipleOf:
    value: Decimal


@dataclass(frozen=True, slots=True)
class Matches:
    """A text is in a language."""

    node: Node


@dataclass(frozen=True, slots=True)
class Size:
    """Bounds of a text's length, an array's items or an object's properties, by `kind`."""

    kind: str
    low: int = 0
    high: int | None = None
    pointer: str = ""


@dataclass(frozen=True, slots=True)
class Items:
    """Goals of an array's first items, and of the others; None says nothing."""

    prefix: tuple[Literal, ...] = ()
    rest: Literal | None = None
    scopes: Scopes = frozenset()


@dataclass(frozen=True, slots=True)
class Contains:
    item: Literal
    low: int
    high: int | None
    pointer: str
    scopes: Scopes = frozenset()


@dataclass(frozen=True, slots=True)
class Unique:
    pointer: str


@dataclass(frozen=True, slots=True)
class Members:
    """Goals of properties by name and by pattern, and of those that neither names."""

    named: tuple[tuple[str, Literal], ...] = ()
    patterns: tuple[tuple[Node, Literal], ...] = ()
    others: Literal | None = None
    scopes: Scopes = frozenset()


@dataclass(frozen=True, slots=True)
class Has:
    """An object has a property, or has not."""

    name: str
    present: bool = True


@dataclass(frozen=True, slots=True)
class Names:
    """Names of all properties are valid."""

    name: Literal


@dataclass(frozen=True, slots=True)
class Depends:
    """With property `name` come the properties `needed`."""

    name: str
    needed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unevaluated:
    """What no other statement in the scope of `owner` evaluates meets this goal."""

    kind: str  # "array" or "object"
    goal: Literal
    owner: str


@dataclass(frozen=True, slots=True)
class Unsupported:
    """Values of a type are bounded in a way that no grammar here expresses."""

    kind: str
    pointer: str
    why: str


NumberFact = Bound | MultipleOf
ArrayFact = Items | Contains | Unique
ObjectFact = Members | Has | Names | Depends
Fact = NumberFact | ArrayFact | ObjectFact | Values | Excluded | Matches | Size | Unevaluated | Unsupported


@dataclass(frozen=True, slots=True)
class Option:
    """One way to meet a keyword: all of its facts and literals, for values of `types`."""

    types: frozenset[str] = TYPES
    facts: tuple[Fact, ...] = ()
    literals: tuple[Literal, ...] = ()
    scopes: Scopes = frozenset()  # of the literals
