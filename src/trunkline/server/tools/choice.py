"""What a request says about tools, and what follows from it: what the prompt shows, which parser reads the
output, and which grammar holds for it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trunkline.engine.constraint import Constraint
from trunkline.engine.fields import Items, Object, OneOf, Rule, Text, read_fields, wrong_type
from trunkline.server.tools.formats import ToolFormat
from trunkline.server.tools.grammar import Json
from trunkline.server.tools.parser import Tool
from trunkline.types import GrammarSpec, RequestError

Mode = Literal["none", "auto", "required"]


@dataclass(frozen=True)
class Choice:
    """`names`: the tools that may be called; empty: all. `single`: one call and no more."""

    mode: Mode
    names: tuple[str, ...] = ()
    single: bool = False


_NAMED = Object({"type": OneOf(("function",)), "function": Object({"name": Text(shortest=1)})})
_ALLOWED = Object({"mode": OneOf(("auto", "required")), "tools": Items(_NAMED, 1024, fewest=1)})


@dataclass(frozen=True)
class ToolChoice(Rule):
    """none, auto, required, one function, or some allowed ones. Reads as a Choice."""

    def read(self, value: Any, name: str) -> Choice:
        if not isinstance(value, dict):
            if not isinstance(value, str):
                raise wrong_type(name, "a string or an object", value)
            mode: Any = OneOf(("none", "auto", "required")).read(value, name)
            return Choice(mode)
        if value.get("type") == "allowed_tools":
            fields = read_fields({"type": Text(), "allowed_tools": _ALLOWED}, value, f"{name}.")
            allowed = fields.get("allowed_tools", {})
            names = tuple(_name(tool, f"{name}.allowed_tools.tools") for tool in allowed.get("tools", ()))
            return Choice(allowed.get("mode", "auto"), names)
        return Choice("required", (_name(_NAMED.read(value, name), name),), single=True)


def _name(fields: Mapping[str, Any], param: str) -> str:
    name = fields.get("function", {}).get("name")
    if name is None:
        raise RequestError(
            f"{param}.function.name is missing", code="missing_field", param=f"{param}.function.name"
        )
    return str(name)


@dataclass(frozen=True)
class ToolPlan:
    """`shown`: what the prompt shows. `format`: how calls are written, None where none are looked for.
    `constraint`: of the whole output, with what `response_format` asks for."""

    shown: list[Json] | None
    tools: tuple[Tool, ...]
    format: ToolFormat | None
    constraint: Constraint | None


def plan_tools(
    fields: Mapping[str, Any], known: ToolFormat | None, constraint: Constraint | None
) -> ToolPlan:
    """Of a request's checked fields. `known`: the model's format. Raises RequestError for what contradicts
    itself, or what the format can't be held to."""
    given = fields.get("tools") or []
    choice = fields.get("tool_choice") or Choice("auto" if given else "none")
    if choice.mode == "required" and not given:
        raise RequestError(
            "tool_choice asks for a call, but there are no tools", code="invalid_value", param="tool_choice"
        )
    tools = tuple(tool_of(tool, f"tools[{i}]") for i, tool in enumerate(given))
    _check_names(tools, choice)
    if choice.mode == "none" or not given:
        return ToolPlan(None, (), None, constraint)
    if choice.mode == "required" and constraint is not None:
        raise RequestError(
            f"tool_choice asks for a call, {constraint.field} for an answer: an output can't be both",
            code="invalid_value",
            param="tool_choice",
        )
    plan = _Plan(fields, choice, tools)
    if known is None:
        if plan.binds:
            raise _no_format(plan.binds)
        return ToolPlan(given, tools, None, constraint)
    try:
        return ToolPlan(given, tools, known, plan.constraint(known, constraint))
    except ValueError as error:  # of a schema that this way of writing calls can't be held to
        raise RequestError(str(error), code="unsupported_grammar", param="tools") from error


class _Plan:
    """`binds`: the field for which the output must be bound by a grammar; "": none."""

    def __init__(self, fields: Mapping[str, Any], choice: Choice, tools: Sequence[Tool]) -> None:
        self._choice = choice
        self._tools = tools
        self._allowed = [tool for tool in tools if not choice.names or tool.name in choice.names]
        self._one = choice.single or not fields.get("parallel_tool_calls", True)
        strict = next((i for i, tool in enumerate(tools) if tool.strict), None)
        if choice.mode == "required" or choice.names:
            self.binds = "tool_choice"
        elif strict is not None:
            self.binds = f"tools[{strict}].function.strict"
        else:
            self.binds = "" if fields.get("parallel_tool_calls", True) else "parallel_tool_calls"

    def constraint(self, known: ToolFormat, answer: Constraint | None) -> Constraint | None:
        frame = known.frame
        if self._choice.mode == "required":
            return self._tag(frame.forced(self._allowed, one=self._one))
        if answer is not None:
            return self._either(known, answer)
        if not self.binds:
            return None
        if not frame.trigger:
            raise RequestError(
                f"{self.binds}: nothing marks the beginning of a call in this model's format "
                f"({known.names[0]}), so free text and bound calls can't be told apart: send "
                'tool_choice "required", or leave it out',
                code="unsupported_field",
                param=self.binds,
            )
        loose = [
            tool if tool.strict or frame.by_parameter else Tool(tool.name, {"type": "object"})
            for tool in self._allowed
        ]
        return self._tag(frame.offered(loose, one=self._one))

    def _either(self, known: ToolFormat, answer: Constraint) -> Constraint:
        """Calls, or an answer in the format that was asked for, where both can be told apart."""
        content = _as_format(answer.spec)
        if content is None or not known.frame.trigger:
            return answer
        calls = known.frame.forced(self._allowed, one=self._one)
        tag = {"type": "or", "elements": [calls, content]}
        return self._tag(tag, answer, ("/format/elements/1", answer.field))

    def _tag(self, form: Json, answer: Constraint | None = None, *origins: tuple[str, str]) -> Constraint:
        source = json.dumps({"type": "structural_tag", "format": form}, ensure_ascii=False)
        ordered = answer is None or answer.spec.ordered
        places = {id(tool): i for i, tool in enumerate(self._tools)}
        fields = [f"tools[{places[id(tool)]}].function.parameters" for tool in self._allowed]
        found = tuple(_origins(form, "/format", fields))
        return Constraint(GrammarSpec("structural_tag", source, ordered), "tools", (*found, *origins))


def _origins(form: Any, pointer: str, fields: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Where in the tag each tool's schema stands."""
    if not isinstance(form, dict):
        return
    tags = form.get("tags", ())
    for i, tag in enumerate(tags):
        if len(tags) == len(fields):
            yield f"{pointer}/tags/{i}", fields[i]
        else:
            yield from _origins(tag, f"{pointer}/tags/{i}", fields)
    for i, inner in enumerate(form.get("elements", ())[:1]):
        yield from _origins(inner, f"{pointer}/elements/{i}", fields)
    if not tags:
        yield from _origins(form.get("content"), f"{pointer}/content", fields)


def _as_format(spec: GrammarSpec) -> Json | None:
    """As a part of a structural tag that begins with a character of JSON; None for other grammars."""
    if spec.kind == "json_object":
        return {"type": "json_schema", "json_schema": {"type": "object"}}
    if spec.kind == "json_schema":
        return {"type": "json_schema", "json_schema": json.loads(spec.source)}
    return None


def tool_of(given: Mapping[str, Any], param: str) -> Tool:
    """Of an entry of `tools`. Raises RequestError."""
    function = given.get("function", {})
    if "name" not in function:
        raise RequestError(
            f"{param}.function.name is missing", code="missing_field", param=f"{param}.function.name"
        )
    return Tool(function["name"], function.get("parameters", {}), function.get("strict", False))


def _check_names(tools: Sequence[Tool], choice: Choice) -> None:
    names = [tool.name for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise RequestError(
                f"tools[{i}].function.name: there are two tools named {name[:100]!r}",
                code="invalid_value",
                param=f"tools[{i}].function.name",
            )
    unknown = next((name for name in choice.names if name not in names), None)
    if unknown is not None:
        raise RequestError(
            f"tool_choice names {unknown[:100]!r}, which is none of the tools: "
            f"{', '.join(names)[:500] or 'there are none'}",
            code="invalid_value",
            param="tool_choice",
        )


def _no_format(param: str) -> RequestError:
    return RequestError(
        f"{param}: it is not known how this model writes tool calls (--tool-call-parser tells it)",
        code="no_tool_parser",
        param=param,
    )
