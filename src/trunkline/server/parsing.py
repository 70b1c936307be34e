"""The parsers of model output, for text that was generated elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from trunkline.config.flags import TOOL_CALL_PARSERS
from trunkline.engine.fields import Flag, Items, OneOf, Rule, Text
from trunkline.server.call import Json
from trunkline.server.endpoint import Access, Endpoint, Parts
from trunkline.server.fields import ANY_LENGTH, MAX_TOOLS, TOOL
from trunkline.server.http import json_response, read_body
from trunkline.server.tools.choice import tool_of
from trunkline.server.tools.formats import tool_format
from trunkline.server.tools.parser import CallArguments, CallStart, ToolParser
from trunkline.text.reasoning import REASONING_FORMATS, split_reasoning
from trunkline.types import RequestError

REASONING_FIELDS: Mapping[str, Rule] = {
    "text": Text(ANY_LENGTH),
    "reasoning_parser": OneOf(tuple(REASONING_FORMATS)),
    "return_blocks": Flag(),
}
CALL_FIELDS: Mapping[str, Rule] = {
    "text": Text(ANY_LENGTH),
    "tools": Items(TOOL, MAX_TOOLS),
    "tool_call_parser": OneOf(TOOL_CALL_PARSERS[2:]),
}


def endpoints(parts: Parts) -> list[Endpoint]:
    return [
        Endpoint(
            "/separate_reasoning",
            ("POST",),
            _separate,
            Access.USER,
            REASONING_FIELDS,
            summary="Reasoning and answer of a text",
        ),
        Endpoint(
            "/parse_function_call",
            ("POST",),
            _parse_calls,
            Access.USER,
            CALL_FIELDS,
            summary="Tool calls in a text",
        ),
    ]


def _needed(fields: dict[str, Any], *names: str) -> None:
    missing = next((name for name in names if name not in fields), None)
    if missing is not None:
        raise RequestError(f"{missing} is missing", code="missing_field", param=missing)


async def _separate(request: Request) -> Response:
    fields = await read_body(request, REASONING_FIELDS)
    _needed(fields, "text", "reasoning_parser")
    reasoning, answer = await asyncio.to_thread(split_reasoning, fields["text"], fields["reasoning_parser"])
    body: Json = {"reasoning_text": reasoning, "text": answer}
    if fields.get("return_blocks"):
        blocks = [("reasoning", reasoning), ("text", answer)]
        body["blocks"] = [{"type": kind, "text": text} for kind, text in blocks if text]
        body |= {f"{kind}_blocks": [text] if text else [] for kind, text in blocks}
    return json_response(body)


async def _parse_calls(request: Request) -> Response:
    fields = await read_body(request, CALL_FIELDS)
    _needed(fields, "text", "tools", "tool_call_parser")
    tools = [tool_of(tool, f"tools[{i}]") for i, tool in enumerate(fields["tools"])]
    found = tool_format(fields["tool_call_parser"])
    assert found is not None
    return json_response(await asyncio.to_thread(_calls, found.parser(tools), fields["text"]))


def _calls(parser: ToolParser, text: str) -> Json:
    texts: list[str] = []
    calls: list[Json] = []
    for event in parser.feed(text) + parser.flush():
        match event:
            case str():
                texts.append(event)
            case CallStart(name):
                calls.append({"tool_index": len(calls), "name": name, "parameters": ""})
            case CallArguments(piece):
                calls[-1]["parameters"] += piece
    return {"normal_text": "".join(texts), "calls": calls}
