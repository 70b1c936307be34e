"""The fields that constrain an output, read into one grammar: SGLang's sampling parameters, OpenAI's
`response_format`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from trunkline.engine.fields import Flag, Object, Rule, Text, read_fields, wrong_type
from trunkline.types import GrammarKind, GrammarSpec, RequestError

MAX_SOURCE = 2**20  # characters of a grammar


class Constraint(NamedTuple):
    """What an output must match, and the field that asked for it, for errors. `origins`: places in a
    structural tag, by pointer, that stand for schemas of other fields."""

    spec: GrammarSpec
    field: str
    origins: tuple[tuple[str, str], ...] = ()

    def locate(self, pointer: str) -> tuple[str, str]:
        """The field that a pointer into the source points into, and the pointer there."""
        for place, name in self.origins:
            if pointer.startswith(f"{place}/"):
                return name, pointer[len(place) :].partition("/json_schema")[2]
        return self.field, pointer


@dataclass(frozen=True)
class JsonText(Rule):
    """JSON as text, or as it is; reads as text. Empty text means "not given"."""

    def read(self, value: Any, name: str) -> str:
        if isinstance(value, dict):
            value = _json_text(value, name)
        if not isinstance(value, str):
            raise wrong_type(name, "JSON as text, or an object", value)
        return Text(MAX_SOURCE).read(value, name)


_SOURCE = Text(MAX_SOURCE)
GRAMMAR_FIELDS: Mapping[str, Rule] = {
    "json_schema": JsonText(),
    "regex": _SOURCE,
    "ebnf": _SOURCE,
    "structural_tag": JsonText(),
}
_KINDS: tuple[GrammarKind, ...] = ("json_schema", "regex", "ebnf", "structural_tag")


@dataclass(frozen=True)
class ResponseFormat(Rule):
    """OpenAI's response_format, with SGLang's structural_tag. Reads as a Constraint; None for plain text."""

    def read(self, value: Any, name: str) -> Constraint | None:
        if not isinstance(value, dict):
            raise wrong_type(name, "an object", value)
        match value.get("type"):
            case "text":
                read_fields({"type": Text()}, value, f"{name}.")
                return None
            case "json_object":
                read_fields({"type": Text()}, value, f"{name}.")
                return Constraint(GrammarSpec("json_object"), name)
            case "json_schema":
                return self._schema(value, name)
            case "structural_tag":
                return Constraint(GrammarSpec("structural_tag", _json_text(value, name)), name)
        raise RequestError(
            f"{name}.type must be one of text, json_object, json_schema, structural_tag",
            code="invalid_value",
            param=f"{name}.type",
        )

    @staticmethod
    def _schema(value: dict[str, Any], name: str) -> Constraint:
        inner = {"name": Text(), "description": Text(MAX_SOURCE), "strict": Flag(), "schema": JsonText()}
        fields = read_fields({"type": Text(), "json_schema": Object(inner)}, value, f"{name}.")
        source = fields.get("json_schema", {}).get("schema")
        param = f"{name}.json_schema.schema"
        if not source:
            raise RequestError(f"{param} is missing", code="missing_field", param=param)
        # As with OpenAI's strict schemas, keys come in the schema's order, unless strict is false.
        ordered = fields["json_schema"].get("strict", True)
        return Constraint(GrammarSpec("json_schema", source, ordered), param)


def take_constraint(fields: dict[str, Any], prefix: str = "") -> Constraint | None:
    """Take the constraint out of checked fields. Raises RequestError for more than one."""
    found = [
        Constraint(GrammarSpec(kind, source, ordered=kind == "json_schema"), f"{prefix}{kind}")
        for kind in _KINDS
        if (source := fields.pop(kind, ""))
    ]
    found += filter(None, [fields.pop("response_format", None)])
    if len(found) > 1:
        raise RequestError(
            f"{found[0].field} and {found[1].field} exclude each other: send one of them",
            code="invalid_value",
            param=found[1].field,
        )
    return found[0] if found else None


def _json_text(value: dict[str, Any], name: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        raise RequestError(f"{name} nests too deeply", code="invalid_value", param=name) from None
