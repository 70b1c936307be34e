"""A JSON schema as a document: places by JSON pointer, references between them, unknown words refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, NoReturn
from urllib.parse import unquote

from trunkline.grammar.protocol import GrammarError

MAX_DEPTH = 100  # of nested JSON in a schema
MAX_PLACES = 50_000  # values in a schema

ANYTHING = "\0true"  # the place of a schema that every document holds: any value

JsonSchema = dict[str, Any] | bool

ASSERTIONS = frozenset(
    "type enum const minimum maximum exclusiveMinimum exclusiveMaximum multipleOf minLength maxLength"
    " pattern format items prefixItems additionalItems minItems maxItems contains minContains"
    " maxContains uniqueItems unevaluatedItems properties patternProperties additionalProperties"
    " required minProperties maxProperties propertyNames dependentRequired dependentSchemas"
    " dependencies unevaluatedProperties allOf anyOf oneOf not if then else $ref".split()
)
ANNOTATIONS = frozenset(
    "title description default example examples deprecated readOnly writeOnly contentEncoding"
    " contentMediaType contentSchema $schema $id id $comment $defs definitions $anchor $vocabulary"
    " strict discriminator externalDocs xml".split()  # the last three: OpenAPI's
)
_SINGLE = frozenset(
    "items additionalItems contains unevaluatedItems additionalProperties propertyNames unevaluatedProperties"
    " not if then else contentSchema".split()
)
_LISTS = frozenset("prefixItems allOf anyOf oneOf items".split())
_MAPS = frozenset("properties patternProperties dependentSchemas dependencies $defs definitions".split())
_COUNTS = frozenset(
    "minLength maxLength minItems maxItems minContains maxContains minProperties maxProperties".split()
)
_NUMBERS = frozenset("minimum maximum exclusiveMinimum exclusiveMaximum multipleOf".split())


class Document:
    """A schema and the schemas made from it, by pointer. Subschemas are checked when they are asked for."""

    def __init__(self, source: str) -> None:
        """Raises GrammarError for what is no JSON, or nested deeper or larger than the limits."""
        try:
            root = json.loads(source, parse_float=_number, parse_constant=_no_constant)
        except RecursionError as error:
            raise GrammarError("the schema is nested too deep", code="grammar_too_complex") from error
        except ValueError as error:
            raise GrammarError(f"the schema is no JSON: {error}", code="invalid_grammar") from error
        _check_size(root)
        try:
            json.dumps(root, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            raise GrammarError("the schema holds a lone surrogate", code="invalid_grammar") from error
        self._root = root
        self._made: dict[str, JsonSchema] = {ANYTHING: True}
        self._checked: dict[str, JsonSchema] = {}
        self._anchors: dict[str, str] | None = None

    def at(self, pointer: str) -> JsonSchema:
        """The schema at a place. Raises GrammarError if it is none, or uses words that are unknown."""
        found = self._checked.get(pointer)
        if found is None:
            found = self._made[pointer] if pointer in self._made else self._checked_schema(pointer)
            self._checked[pointer] = found
        return found

    def make(self, schema: JsonSchema, near: str) -> str:
        """A pointer for a schema that the document does not hold; equal ones near a place get the same."""
        pointer = f"{near}\0{json.dumps(schema, default=str, sort_keys=True)}"
        self._made[pointer] = schema
        return pointer

    def target(self, pointer: str) -> str:
        """Where the `$ref` of the schema at `pointer` leads."""
        reference = self.at(pointer)["$ref"]  # type: ignore[index]
        base = self._root.get("$id", "") if isinstance(self._root, dict) else ""
        if isinstance(base, str) and base and reference.startswith(base.rstrip("#")):
            reference = reference[len(base.rstrip("#")) :] or "#"
        if not reference.startswith("#"):
            refuse(f"{pointer}/$ref", f"reference {reference[:100]!r} leads out of the schema")
        fragment = unquote(reference[1:])
        if fragment and not fragment.startswith("/"):
            return self._anchor(fragment, pointer)
        try:
            self._value(fragment)
        except (KeyError, IndexError, ValueError, TypeError):
            invalid(f"{pointer}/$ref", f"nothing is at {reference[:100]!r}")
        return fragment

    def _anchor(self, name: str, pointer: str) -> str:
        if self._anchors is None:
            self._anchors = {
                value["$anchor"]: place
                for place, value in _walk(self._root, "")
                if isinstance(value, dict) and isinstance(value.get("$anchor"), str)
            }
        if name not in self._anchors:
            invalid(f"{pointer}/$ref", f"no $anchor {name[:100]!r}")
        return self._anchors[name]

    def _value(self, pointer: str) -> Any:
        value = self._root
        for part in pointer.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            value = value[int(key)] if isinstance(value, list) else value[key]
        return value

    def _checked_schema(self, pointer: str) -> JsonSchema:
        schema = self._value(pointer)
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            invalid(pointer, f"a schema is an object or a boolean, not {type(schema).__name__}")
        for word, value in schema.items():
            place = f"{pointer}/{escape(word)}"
            if word not in ASSERTIONS | ANNOTATIONS and not word.startswith("x-"):
                refuse(place, f"unknown keyword {word[:100]!r} (names of your own start with x-)")
            _check_word(place, word, value)
        if pointer and isinstance(schema.get("$id"), str) and not schema["$id"].startswith("#"):
            refuse(f"{pointer}/$id", "a schema inside of a schema has an $id of its own")
        return schema


def escape(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def refuse(pointer: str, why: str) -> NoReturn:
    """What is well-formed, but can't be enforced exactly."""
    raise _error(pointer, why, "unsupported_grammar")


def invalid(pointer: str, why: str) -> NoReturn:
    raise _error(pointer, why, "invalid_grammar")


def too_complex(pointer: str, why: str) -> NoReturn:
    raise _error(pointer, why, "grammar_too_complex")


def _error(pointer: str, why: str, code: str) -> GrammarError:
    pointer = pointer.split("\0")[0]
    return GrammarError(f"{why}, at {pointer or 'the root'} of the schema", code=code, pointer=pointer)


def _number(text: str) -> Decimal:
    if len(text) > 400 or abs(Decimal(text).adjusted()) > 400:
        raise ValueError(f"the number {text[:40]} is out of range")
    return Decimal(text)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _walk(value: Any, pointer: str) -> Iterator[tuple[str, Any]]:
    todo = [(pointer, value)]
    while todo:
        place, value = todo.pop()
        yield place, value
        if isinstance(value, dict):
            todo += [(f"{place}/{escape(key)}", inner) for key, inner in value.items()]
        elif isinstance(value, list):
            todo += [(f"{place}/{index}", inner) for index, inner in enumerate(value)]


def _check_size(root: Any) -> None:
    todo = [(root, 0)]
    count = 0
    while todo:
        value, depth = todo.pop()
        count += 1
        if depth > MAX_DEPTH:
            too_complex("", f"nested deeper than {MAX_DEPTH} levels")
        if count > MAX_PLACES:
            too_complex("", f"over {MAX_PLACES} values")
        if isinstance(value, dict):
            todo += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list):
            todo += [(inner, depth + 1) for inner in value]


def _check_word(place: str, word: str, value: Any) -> None:
    """The shape of a keyword's value, so that the rest of this package can rely on it."""
    for words, expected, holds in _FORMS:
        if word in words:
            if not holds(value):
                invalid(place, f"not {expected}")
            break
    if word in _LISTS and value == [] and word != "prefixItems":
        invalid(place, "an empty list")
    if word == "multipleOf" and value <= 0:
        invalid(place, "not above 0")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | Decimal) and not isinstance(value, bool)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_types(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return all(isinstance(name, str) and _TYPES.fullmatch(name) is not None for name in names)


def _is_dependencies(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_names(v) or isinstance(v, dict | bool) for v in value.values())


_TYPES = re.compile("null|boolean|integer|number|string|array|object")


_FORMS: tuple[tuple[frozenset[str], str, Callable[[Any], bool]], ...] = (
    (frozenset({"items"}), "a schema or a list of schemas", lambda v: isinstance(v, dict | bool | list)),
    (frozenset({"dependencies"}), "lists of names or schemas", _is_dependencies),
    (
        frozenset({"dependentRequired"}),
        "lists of names",
        lambda v: isinstance(v, dict) and all(map(_is_names, v.values())),
    ),
    (frozenset({"type"}), "a type or a list of types", _is_types),
    (frozenset({"required"}), "a list of names", _is_names),
    (_LISTS | {"enum"}, "a list", lambda v: isinstance(v, list)),
    (_MAPS, "an object", lambda v: isinstance(v, dict)),
    (_SINGLE, "a schema", lambda v: isinstance(v, dict | bool)),
    (_COUNTS, "a whole number", lambda v: _is_number(v) and v >= 0 and v == int(v)),
    (  # true in draft 4
        frozenset({"exclusiveMinimum", "exclusiveMaximum"}),
        "a number",
        lambda v: isinstance(v, bool) or _is_number(v),
    ),
    (_NUMBERS, "a number", _is_number),
    (frozenset({"pattern", "format", "$ref"}), "a text", lambda v: isinstance(v, str)),
    (frozenset({"uniqueItems"}), "a boolean", lambda v: isinstance(v, bool)),
)
