"""The OpenAPI document of the server, made from the table of routes and the rules of their fields."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from trunkline import __version__
from trunkline.engine.fields import Rule, object_schema
from trunkline.server.call import Json
from trunkline.server.endpoint import Access, Endpoint
from trunkline.server.http import json_response

_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
_ERROR: Mapping[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
                "pointer": {"type": "string", "description": "JSON pointer into a grammar"},
            },
        }
    },
}


def openapi_endpoint(others: Iterable[Endpoint]) -> Endpoint:
    """GET /openapi.json, which describes `others` and itself."""
    table = list(others)

    async def answer(request: Request) -> Response:
        return json_response(document([*table, own]))

    own = Endpoint("/openapi.json", ("GET",), answer, Access.USER, summary="This document")
    return own


def document(endpoints: Iterable[Endpoint]) -> Json:
    """OpenAPI 3.1."""
    paths: dict[str, Json] = {}
    for endpoint in endpoints:
        path = _PARAMETER.sub(r"{\1}", endpoint.path)
        for method in endpoint.methods:
            paths.setdefault(path, {})[method.lower()] = _operation(endpoint, method)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Trunkline", "version": __version__},
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": {"Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(endpoint: Endpoint, method: str) -> Json:
    words = re.sub(r"\W+", "_", f"{method.lower()}{endpoint.path}").strip("_")
    operation: Json = {"operationId": words, "summary": endpoint.summary, "tags": [endpoint.access.value]}
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in _PARAMETER.findall(endpoint.path)
    ]
    parameters += [_query(name, rule) for name, rule in (endpoint.query or {}).items()]
    if parameters:
        operation["parameters"] = parameters
    if endpoint.fields is not None and method != "GET":
        schema = object_schema(endpoint.fields)
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if endpoint.access is not Access.OPEN:
        operation["security"] = [{"key": []}, {}]
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    operation["responses"] = {
        "200": {"description": "What was asked for"},
        "default": {"description": "An error; docs/errors.md lists the codes", "content": error},
    }
    return operation


def _query(name: str, rule: Rule) -> Json:
    return {"name": name, "in": "query", "required": False, "schema": rule.schema()}
