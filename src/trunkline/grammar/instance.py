"""Is a given value valid? For the finite parts of a schema: enum, const, names of properties."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

from trunkline.grammar.automaton import Automaton
from trunkline.grammar.document import ANNOTATIONS, Document, escape, refuse
from trunkline.grammar.formats import ANNOTATIONS as FORMAT_ANNOTATIONS
from trunkline.grammar.formats import FORMATS, format_language
from trunkline.grammar.regex import search_language

Check = Callable[[Any], bool]


def identity(value: Any) -> object:
    """A hashable that is equal for equal JSON values: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return type(value).__name__, value
    if isinstance(value, int | Decimal):
        return "number", Decimal(value)
    if isinstance(value, list):
        return "array", tuple(map(identity, value))
    return "object", frozenset((key, identity(inner)) for key, inner in value.items())


def kinds(value: Any) -> frozenset[str]:
    """The JSON types of a value: two for an integral number."""
    if value is None:
        return frozenset({"null"})
    if isinstance(value, bool):
        return frozenset({"boolean"})
    if isinstance(value, int | Decimal):
        return frozenset({"number", "integer"} if value == int(value) else {"number"})
    if isinstance(value, str):
        return frozenset({"string"})
    return frozenset({"array"} if isinstance(value, list) else {"object"})


class InstanceValidator:
    """Validates values against places of a document. Raises GrammarError for keywords it can't decide."""

    def __init__(self, document: Document, automaton: Automaton) -> None:
        self._document = document
        self._automaton = automaton
        self._enums: dict[str, frozenset[object]] = {}

    def accepts(self, pointer: str, value: Any) -> bool:
        schema = self._document.at(pointer)
        if isinstance(schema, bool):
            return schema
        return all(
            self._holds(pointer, schema, word, value)
            for word in schema
            if word not in ANNOTATIONS and not word.startswith("x-")
        )

    def _holds(self, pointer: str, schema: dict[str, Any], word: str, value: Any) -> bool:
        wanted: Any = schema[word]
        place = f"{pointer}/{escape(word)}"
        match word:
            case "type":
                return not kinds(value).isdisjoint(wanted if isinstance(wanted, list) else [wanted])
            case "enum":
                if place not in self._enums:
                    self._enums[place] = frozenset(map(identity, wanted))
                return identity(value) in self._enums[place]
            case "const":
                return identity(value) == identity(wanted)
            case "$ref":
                return self.accepts(self._document.target(pointer), value)
            case "allOf" | "anyOf" | "oneOf":
                holds = [self.accepts(f"{place}/{index}", value) for index in range(len(wanted))]
                return {"allOf": all(holds), "anyOf": any(holds), "oneOf": sum(holds) == 1}[word]
            case "not":
                return not self.accepts(place, value)
            case "if":
                branch = "then" if self.accepts(place, value) else "else"
                return branch not in schema or self.accepts(f"{pointer}/{branch}", value)
            case "then" | "else" | "minContains" | "maxContains" | "additionalItems":
                return True
        if isinstance(value, str):
            return self._text(place, word, wanted, value)
        if isinstance(value, list):
            return self._array(pointer, schema, word, value)
        if isinstance(value, dict):
            return self._object(pointer, schema, word, value)
        if isinstance(value, int | Decimal) and not isinstance(value, bool):
            return _number(schema, word, wanted, value)
        return True

    def _text(self, place: str, word: str, wanted: Any, value: str) -> bool:
        match word:
            case "minLength":
                return bool(len(value) >= wanted)
            case "maxLength":
                return bool(len(value) <= wanted)
            case "pattern":
                return self._automaton.accepts(search_language(wanted), value)
            case "format":
                if wanted in FORMATS:
                    return self._automaton.accepts(format_language(wanted), value)
                if wanted not in FORMAT_ANNOTATIONS:
                    refuse(place, f"unknown format {wanted[:40]!r}")
        return True

    def _array(self, pointer: str, schema: dict[str, Any], word: str, value: list[Any]) -> bool:
        wanted: Any = schema[word]
        place = f"{pointer}/{word}"
        match word:
            case "minItems":
                return bool(len(value) >= wanted)
            case "maxItems":
                return bool(len(value) <= wanted)
            case "uniqueItems":
                return not wanted or len(set(map(identity, value))) == len(value)
            case "prefixItems":
                pairs = zip(range(len(wanted)), value, strict=False)
                return all(self.accepts(f"{place}/{index}", item) for index, item in pairs)
            case "items" if isinstance(wanted, list):
                pairs = zip(range(len(wanted)), value, strict=False)
                rest = value[len(wanted) :] if "additionalItems" in schema else []
                return all(self.accepts(f"{place}/{index}", item) for index, item in pairs) and all(
                    self.accepts(f"{pointer}/additionalItems", item) for item in rest
                )
            case "items":
                return all(self.accepts(place, item) for item in value[len(schema.get("prefixItems", ())) :])
            case "contains":
                found = sum(self.accepts(place, item) for item in value)
                return bool(schema.get("minContains", 1) <= found <= schema.get("maxContains", found))
            case "unevaluatedItems":
                refuse(place, "unevaluatedItems beside enum or const")
        return True

    def _object(self, pointer: str, schema: dict[str, Any], word: str, value: dict[str, Any]) -> bool:
        wanted: Any = schema[word]
        place = f"{pointer}/{word}"
        match word:
            case "minProperties":
                return bool(len(value) >= wanted)
            case "maxProperties":
                return bool(len(value) <= wanted)
            case "required":
                return all(name in value for name in wanted)
            case "properties":
                return all(
                    self.accepts(f"{place}/{escape(name)}", value[name]) for name in wanted if name in value
                )
            case "patternProperties":
                return all(
                    self.accepts(f"{place}/{escape(pattern)}", inner)
                    for pattern in wanted
                    for name, inner in value.items()
                    if self._automaton.accepts(search_language(pattern), name)
                )
            case "additionalProperties":
                return all(
                    self.accepts(place, inner)
                    for name, inner in value.items()
                    if name not in schema.get("properties", {})
                    and not any(
                        self._automaton.accepts(search_language(pattern), name)
                        for pattern in schema.get("patternProperties", {})
                    )
                )
            case "propertyNames":
                return all(self.accepts(place, name) for name in value)
            case "dependentRequired" | "dependentSchemas" | "dependencies":
                return all(
                    all(needed in value for needed in then)
                    if isinstance(then, list)
                    else self.accepts(f"{place}/{escape(name)}", value)
                    for name, then in wanted.items()
                    if name in value
                )
            case "unevaluatedProperties":
                refuse(place, "unevaluatedProperties beside enum or const")
        return True


def _number(schema: dict[str, Any], word: str, wanted: Any, value: int | Decimal) -> bool:
    match word:
        case "minimum":
            return bool(value > wanted if schema.get("exclusiveMinimum") is True else value >= wanted)
        case "maximum":
            return bool(value < wanted if schema.get("exclusiveMaximum") is True else value <= wanted)
        case "exclusiveMinimum":
            return isinstance(wanted, bool) or bool(value > wanted)
        case "exclusiveMaximum":
            return isinstance(wanted, bool) or bool(value < wanted)
        case "multipleOf":
            return Fraction(value) % Fraction(wanted) == 0
        case "format":
            bits = {"int32": 31, "int64": 63}.get(wanted)
            return bits is None or (value == int(value) and -(2**bits) <= value < 2**bits)
    return True
