"""Grammars for tool calls: what a model must write so that its format's parser reads valid calls. Written as
structural tags (`grammar/structural.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trunkline.server.tools.parser import Tool

Json = dict[str, Any]
CallFormat = Callable[[Tool], Json]  # one call, from its first character to its last


@dataclass(frozen=True)
class Frame:
    """How calls stand in a message. `trigger`: the mark in free text behind which there is a call, "" where
    nothing but the call itself shows it. Without `before` and `after`, every call begins with the trigger."""

    call: CallFormat
    before: str = ""
    separator: str = ""
    after: str = ""
    trigger: str = ""
    single: bool = False  # a message has one call at most
    by_parameter: bool = False  # without the parameters of a tool, nothing can be written for it

    def forced(self, tools: Sequence[Tool], *, one: bool) -> Json:
        """Calls of these tools and nothing else: one, or as many as the model likes."""
        calls = self._calls(tools, one)
        if not self.before and not self.after:
            return calls
        return {"type": "tag", "begin": self.before, "content": calls, "end": self.after}

    def offered(self, tools: Sequence[Tool], *, one: bool) -> Json:
        """Free text in which calls may stand; at most one if `one`. Only with a trigger."""
        if self.before or self.after:
            tags = [self.forced(tools, one=one)]
        else:
            tags = [self.call(tool) for tool in tools]
        return {"type": "triggered_tags", "triggers": [self.trigger], "tags": tags, "stop_after_first": one}

    def _calls(self, tools: Sequence[Tool], one: bool) -> Json:
        tags = [self.call(tool) for tool in tools]
        return {
            "type": "tags_with_separator",
            "tags": tags,
            "separator": self.separator,
            "at_least_one": True,
            "stop_after_first": one or self.single,
        }


def argument_schema(tool: Tool) -> Json:
    """What the arguments must match: an object."""
    if not tool.parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **tool.parameters}


# ---------------------------------------------------------------------- arguments that are not one JSON text
@dataclass(frozen=True)
class Parameter:
    """One argument that a format writes apart. `text`: its value is written without quotes; `schema` stands
    on its own (with the definitions of the whole)."""

    name: str
    schema: Json
    text: bool
    required: bool


def parameters(tool: Tool) -> Iterator[Parameter]:
    """In the order in which the schema has them. Raises ValueError for a schema that says more than what each
    of them is."""
    schema = tool.parameters
    other = sorted(schema.keys() - _OF_OBJECTS)
    if other:
        raise ValueError(f"{other[0]!r} beside the parameters can't be enforced in this model's format")
    properties = schema.get("properties", {})
    required = schema.get("required", ())
    definitions = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    for name, inner in properties.items() if isinstance(properties, dict) else ():
        own = inner if isinstance(inner, dict) else {}
        yield Parameter(name, {**definitions, **own}, is_text(own), name in required)


_OF_OBJECTS = frozenset(
    "type properties required additionalProperties $defs definitions description title $schema".split()
)


def is_text(schema: Any) -> bool:
    """Whether values of a parameter are texts and nothing else."""
    if not isinstance(schema, Mapping):
        return False
    if "type" in schema:
        return bool(schema["type"] == "string")
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return bool(values) and all(isinstance(value, str) for value in values)


def bare_text(schema: Json, name: str) -> Json:
    """A text without quotes. Raises ValueError for what can't be held to its schema in this form."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if values is not None:
        options = [{"type": "const_string", "value": value} for value in values if isinstance(value, str)]
        return options[0] if len(options) == 1 else {"type": "or", "elements": options}
    known = {"type", "description", "title", "default", "examples", "$defs", "definitions"}
    other = sorted(schema.keys() - known)
    if other:
        raise ValueError(
            f"parameter {name[:100]!r}: {other[0]} of a text can't be enforced in this model's format"
        )
    return {"type": "any_text"}


def optional(content: Json) -> Json:
    return {"type": "optional", "content": content}


def sequence(elements: Sequence[Json]) -> Json:
    return {"type": "sequence", "elements": list(elements)} if elements else const("")


def const(text: str) -> Json:
    return {"type": "const_string", "value": text}
