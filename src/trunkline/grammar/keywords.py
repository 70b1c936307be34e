"""Each keyword as a choice of options: what it says, and what its negation says.

Every keyword of a schema holds, so the options of different keywords multiply; to negate a schema is to
choose a keyword and negate it.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from itertools import combinations
from typing import Any

from trunkline.grammar.document import ANNOTATIONS, ANYTHING, Document, escape, refuse
from trunkline.grammar.facts import (
    NUMERIC,
    TYPES,
    Bound,
    Contains,
    Depends,
    Excluded,
    Has,
    Items,
    Literal,
    Matches,
    Members,
    MultipleOf,
    Names,
    Option,
    Scopes,
    Size,
    Unevaluated,
    Unique,
    Unsupported,
    Values,
)
from trunkline.grammar.formats import ANNOTATIONS as FORMAT_ANNOTATIONS
from trunkline.grammar.formats import FORMATS, format_language
from trunkline.grammar.protocol import GrammarError
from trunkline.grammar.regex import Node, negate, search_language

STRING, ARRAY, OBJECT = frozenset({"string"}), frozenset({"array"}), frozenset({"object"})
MAX_JOINED = 4  # branches of anyOf that count towards unevaluated...: every subset of them is an option
Choice = list[Option]


def positive_choices(document: Document, pointer: str, scopes: Scopes) -> Iterator[Choice]:
    """What a schema says, as choices that all have to be made."""
    schema = document.at(pointer)
    if isinstance(schema, bool):
        if not schema:
            yield []
        return
    if "unevaluatedProperties" in schema or "unevaluatedItems" in schema:
        scopes = scopes | {pointer}
    for word in _words(schema):
        if word in ("oneOf", "dependentSchemas", "dependencies"):
            continue  # the caller's: they depend on which options overlap, or split by property
        yield _positive(document, pointer, schema, word, scopes)


def negative_choice(document: Document, pointer: str) -> Choice:
    """The ways in which a schema does not hold."""
    schema = document.at(pointer)
    if isinstance(schema, bool):
        return [] if schema else [Option()]
    return [option for word in _words(schema) for option in _negative(document, pointer, schema, word)]


def _words(schema: dict[str, Any]) -> Iterator[str]:
    """Keywords that say something, each once where several are read together."""
    seen = set()
    for word in schema:
        if word in ANNOTATIONS or word.startswith("x-") or word in ("then", "else"):
            continue
        if word in ("items", "prefixItems", "additionalItems"):
            word = "items"
        elif word in ("properties", "patternProperties", "additionalProperties"):
            word = "properties"
        elif word in ("minContains", "maxContains"):
            continue  # without contains they say nothing
        if word not in seen:
            seen.add(word)
            yield word


def _positive(document: Document, pointer: str, schema: dict[str, Any], word: str, scopes: Scopes) -> Choice:
    place = f"{pointer}/{word}"
    wanted: Any = schema.get(word)
    match word:
        case "$ref":
            return [_in_place(scopes, Literal(document.target(pointer)))]
        case "allOf":
            return [_in_place(scopes, *(Literal(f"{place}/{index}") for index in range(len(wanted))))]
        case "anyOf":
            return _any_of(place, len(wanted), scopes)
        case "not":
            return [Option(literals=(Literal(place, False),))]
        case "if":
            return _conditional(pointer, schema, scopes)
        case "properties":
            return [Option(facts=(_members(pointer, schema, scopes),))]
        case "items":
            return [Option(facts=(_items(pointer, schema, scopes),))]
        case "contains":
            low, high = _contains_bounds(schema)
            return [Option(facts=(Contains(Literal(place), low, high, place, scopes),))]
        case "unevaluatedProperties" | "unevaluatedItems":
            kind = "object" if word == "unevaluatedProperties" else "array"
            return [Option(facts=(Unevaluated(kind, Literal(place), pointer),))]
    return [_simple(document, pointer, schema, word)]


def property_conditions(pointer: str, schema: dict[str, Any], word: str, scopes: Scopes) -> Iterator[Choice]:
    """dependentSchemas and the older dependencies: one choice for each property."""
    for name, then in schema[word].items():
        if isinstance(then, list):
            yield [Option(facts=(Depends(name, tuple(then)),))]
            continue
        literal = Literal(f"{pointer}/{word}/{escape(name)}")
        with_it = Option(OBJECT, (Has(name),), (literal,), scopes)
        yield [Option(TYPES - OBJECT), Option(OBJECT, (Has(name, False),)), with_it]


def _in_place(scopes: Scopes, *literals: Literal) -> Option:
    return Option(literals=literals, scopes=scopes)


def _any_of(place: str, count: int, scopes: Scopes) -> Choice:
    single = [_in_place(scopes, Literal(f"{place}/{index}")) for index in range(count)]
    if not scopes:
        return single
    if count > MAX_JOINED:
        refuse(place, f"over {MAX_JOINED} branches beside unevaluated properties or items")
    joined = [
        _in_place(scopes, *(Literal(f"{place}/{index}") for index in chosen))
        for size in range(2, count + 1)
        for chosen in combinations(range(count), size)
    ]
    return single + joined


def _conditional(pointer: str, schema: dict[str, Any], scopes: Scopes) -> Choice:
    def side(word: str) -> tuple[Literal, ...]:
        return (Literal(f"{pointer}/{word}"),) if word in schema else ()

    if "then" not in schema and "else" not in schema and not scopes:
        return [Option()]
    condition = f"{pointer}/if"
    return [
        _in_place(scopes, Literal(condition), *side("then")),
        _in_place(scopes, Literal(condition, False), *side("else")),
    ]


def _members(pointer: str, schema: dict[str, Any], scopes: Scopes = frozenset()) -> Members:
    named = tuple(
        (name, Literal(f"{pointer}/properties/{escape(name)}")) for name in schema.get("properties", {})
    )
    patterns = tuple(
        (
            _pattern(f"{pointer}/patternProperties/{escape(p)}", p),
            Literal(f"{pointer}/patternProperties/{escape(p)}"),
        )
        for p in schema.get("patternProperties", {})
    )
    others = Literal(f"{pointer}/additionalProperties") if "additionalProperties" in schema else None
    return Members(named, patterns, others, scopes)


def _items(pointer: str, schema: dict[str, Any], scopes: Scopes = frozenset()) -> Items:
    older = isinstance(schema.get("items"), list)
    first = "items" if older else "prefixItems"
    rest = "additionalItems" if older else "items"
    prefix = tuple(Literal(f"{pointer}/{first}/{index}") for index in range(len(schema.get(first, ()))))
    return Items(prefix, Literal(f"{pointer}/{rest}") if rest in schema else None, scopes)


def _contains_bounds(schema: dict[str, Any]) -> tuple[int, int | None]:
    high = schema.get("maxContains")
    return int(schema.get("minContains", 1)), None if high is None else int(high)


def _pattern(place: str, pattern: str) -> Node:
    try:
        return search_language(pattern)
    except GrammarError as error:
        raise GrammarError(f"{error.message}, at {place}", code=error.code, pointer=place) from error


def _types(wanted: Any) -> frozenset[str]:
    names = set(wanted if isinstance(wanted, list) else [wanted])
    if "number" in names:
        names |= NUMERIC
    return frozenset(names) - {"number"}


def _bound(schema: dict[str, Any], word: str) -> Bound | None:
    upper = word in ("maximum", "exclusiveMaximum")
    wanted = schema[word]
    if isinstance(wanted, bool):  # draft 4: a flag of the bound beside it
        return None
    flag = schema.get("exclusiveMaximum" if upper else "exclusiveMinimum") is True
    return Bound(Decimal(wanted), upper, word.startswith("exclusive") or flag)


def _simple(document: Document, pointer: str, schema: dict[str, Any], word: str) -> Option:
    """Keywords that state one fact."""
    wanted = schema[word]
    place = f"{pointer}/{word}"
    match word:
        case "type":
            return Option(_types(wanted))
        case "enum":
            return Option(facts=(Values(tuple(wanted)),))
        case "const":
            return Option(facts=(Values((wanted,)),))
        case "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum":
            bound = _bound(schema, word)
            return Option(facts=(bound,) if bound else ())
        case "multipleOf":
            return Option(facts=(MultipleOf(Decimal(wanted)),))
        case "pattern":
            return Option(facts=(Matches(_pattern(place, wanted)),))
        case "format":
            return _format(place, wanted)
        case "uniqueItems":
            return Option(facts=(Unique(place),) if wanted else ())
        case "required":
            return Option(facts=tuple(Has(name) for name in wanted))
        case "propertyNames":
            return Option(facts=(Names(Literal(place)),))
        case "dependentRequired":
            return Option(facts=tuple(Depends(name, tuple(needed)) for name, needed in wanted.items()))
    low, kind = _size_word(word)
    size = Size(kind, int(wanted), None, place) if low else Size(kind, 0, int(wanted), place)
    return Option(facts=(size,))


def _size_word(word: str) -> tuple[bool, str]:
    kind = {"Length": "string", "Items": "array", "Properties": "object"}[word[3:]]
    return word.startswith("min"), kind


def _format(place: str, name: str) -> Option:
    if name in ("int32", "int64"):
        limit = Decimal(2 ** (31 if name == "int32" else 63))
        return Option(TYPES - {"fraction"}, (Bound(-limit, False, False), Bound(limit, True, True)))
    if name in FORMAT_ANNOTATIONS:
        return Option()
    if name not in FORMATS:
        refuse(place, f"unknown format {name[:40]!r}")
    return Option(facts=(Matches(format_language(name)),))


def _negative(document: Document, pointer: str, schema: dict[str, Any], word: str) -> Choice:
    place = f"{pointer}/{word}"
    wanted: Any = schema.get(word)
    match word:
        case "$ref":
            return [Option(literals=(Literal(document.target(pointer), False),))]
        case "allOf":
            return [Option(literals=(Literal(f"{place}/{index}", False),)) for index in range(len(wanted))]
        case "anyOf":
            return [
                Option(literals=tuple(Literal(f"{place}/{index}", False) for index in range(len(wanted))))
            ]
        case "oneOf":
            places = [f"{place}/{index}" for index in range(len(wanted))]
            none = Option(literals=tuple(Literal(option, False) for option in places))
            return [none, *(Option(literals=(Literal(a), Literal(b))) for a, b in combinations(places, 2))]
        case "not":
            return [Option(literals=(Literal(place),))]
        case "if":
            condition = f"{pointer}/if"
            return [
                Option(literals=(Literal(condition, word == "then"), Literal(f"{pointer}/{word}", False)))
                for word in ("then", "else")
                if word in schema
            ]
        case "properties":
            return _negative_members(pointer, schema)
        case "items" | "contains" | "uniqueItems" | "unevaluatedItems":
            return _negative_array(pointer, schema, word)
        case "unevaluatedProperties" | "propertyNames":
            return [_unsupported("object", place)] if wanted is not True else []
        case "dependentRequired" | "dependencies" | "dependentSchemas":
            return _negative_conditions(place, wanted)
    return _negative_simple(document, pointer, schema, word)


def _unsupported(kind: str, place: str) -> Option:
    why = f"the negation of {place.rsplit('/', 1)[-1]}"
    types = NUMERIC if kind == "number" else frozenset({kind})
    return Option(types, tuple(Unsupported(name, place, why) for name in types))


def _negative_members(pointer: str, schema: dict[str, Any]) -> Choice:
    options = []
    for name, literal in _members(pointer, schema).named:
        wrong = Members(((name, Literal(literal.pointer, False)),))
        options.append(Option(OBJECT, (Has(name), wrong)))
    for word in ("patternProperties", "additionalProperties"):
        if schema.get(word) not in (None, True, {}):
            options.append(_unsupported("object", f"{pointer}/{word}"))
    return options


def _negative_array(pointer: str, schema: dict[str, Any], word: str) -> Choice:
    place = f"{pointer}/{word}"
    if word == "items":
        items = _items(pointer, schema)
        options = []
        for index, literal in enumerate(items.prefix):
            wrong = Items((*[Literal(ANYTHING)] * index, Literal(literal.pointer, False)))
            options.append(Option(ARRAY, (Size("array", low=index + 1), wrong)))
        if items.rest is not None and items.prefix:
            options.append(_unsupported("array", place))
        elif items.rest is not None:
            wrong_item = Literal(items.rest.pointer, False)
            options.append(Option(ARRAY, (Contains(wrong_item, 1, None, place),)))
        return options
    if word == "contains":
        low, high = _contains_bounds(schema)
        options = []
        if low == 1:
            options.append(Option(ARRAY, (Items(rest=Literal(place, False)),)))
        elif low > 1:
            options.append(Option(ARRAY, (Contains(Literal(place), 0, low - 1, place),)))
        if high is not None:
            options.append(Option(ARRAY, (Contains(Literal(place), high + 1, None, place),)))
        return options
    return [_unsupported("array", place)] if schema[word] is not False or word != "uniqueItems" else []


def _negative_conditions(place: str, wanted: dict[str, Any]) -> Choice:
    options = []
    for name, then in wanted.items():
        if isinstance(then, list):
            options += [Option(OBJECT, (Has(name), Has(needed, False))) for needed in then]
        else:
            options.append(Option(OBJECT, (Has(name),), (Literal(f"{place}/{escape(name)}", False),)))
    return options


def _negative_simple(document: Document, pointer: str, schema: dict[str, Any], word: str) -> Choice:
    wanted = schema[word]
    place = f"{pointer}/{word}"
    match word:
        case "type":
            return [Option(TYPES - _types(wanted))]
        case "enum":
            return [Option(facts=(Excluded(tuple(wanted), place),))]
        case "const":
            return [Option(facts=(Excluded((wanted,), place),))]
        case "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum":
            bound = _bound(schema, word)
            if bound is None:
                return []
            return [Option(NUMERIC, (Bound(bound.value, not bound.upper, not bound.is_open),))]
        case "multipleOf":
            return [Option(frozenset({"fraction"}))] if wanted == 1 else [_unsupported("number", place)]
        case "pattern":
            return [Option(STRING, (Matches(negate(_pattern(place, wanted))),))]
        case "format":
            return _negative_format(place, wanted)
        case "required":
            return [Option(OBJECT, (Has(name, False),)) for name in wanted]
    low, kind = _size_word(word)
    types = frozenset({kind})
    if low:
        return [Option(types, (Size(kind, high=int(wanted) - 1),))] if wanted > 0 else []
    return [Option(types, (Size(kind, low=int(wanted) + 1),))]


def _negative_format(place: str, name: str) -> Choice:
    if name in FORMAT_ANNOTATIONS:
        return [_unsupported("number", place)] if name in ("int32", "int64") else []
    if name not in FORMATS:
        refuse(place, f"unknown format {name[:40]!r}")
    if not FORMATS[name].whole:
        return [_unsupported("string", place)]
    return [Option(STRING, (Matches(negate(format_language(name))),))]
