"""For curious users and for routers: which parameters were in force, and how loaded the engine is."""

from __future__ import annotations

import time
from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response

from trunkline import __version__
from trunkline.engine.effective import effective_parameters
from trunkline.engine.fields import Number, OneOf, Rule, Text
from trunkline.metrics.load import NOT_HERE, SECTIONS, load_of
from trunkline.metrics.prometheus import CONTENT_TYPE
from trunkline.server.endpoint import Access, Endpoint, Parts
from trunkline.server.http import json_response, read_query
from trunkline.types import RequestError

LOAD_QUERY: Mapping[str, Rule] = {
    "dp_rank": Number(0, 0),
    "include": Text(),
    "format": OneOf(("json", "prometheus")),
}


def endpoints(parts: Parts) -> list[Endpoint]:
    own = _Insight(parts)
    return [
        Endpoint(
            "/effective_parameters/{rid:path}", ("GET",), own.effective, Access.USER,
            summary="Which parameters a request had, and why", one_process=True,
        ),
        Endpoint(
            "/v1/loads", ("GET",), own.loads, Access.USER, query=LOAD_QUERY,
            summary="How loaded the engine is, for routers",
        ),
    ]  # fmt: skip


class _Insight:
    def __init__(self, parts: Parts) -> None:
        self._frontend = parts.frontend
        self._metrics = parts.metrics

    async def effective(self, request: Request) -> Response:
        frontend = self._frontend
        rid = request.path_params["rid"]
        limit = frontend.ready.max_context
        return json_response(effective_parameters(frontend.journal, frontend.config, rid, limit))

    async def loads(self, request: Request) -> Response:
        query = read_query(LOAD_QUERY, request)
        include = _sections(query.get("include", "all"))
        stats = await self._frontend.client.stats()
        if query.get("format") == "prometheus":
            return Response(self._metrics.core_exposition(stats), media_type=CONTENT_TYPE)
        throughput = self._metrics.gen_throughput(stats)
        return json_response(
            {
                "timestamp": time.time(),
                "version": __version__,
                "accelerator": self._frontend.config.model.device,
                "num_accelerators": 1,
                "loads": [load_of(stats, self._frontend.ready, throughput, include)],
            }
        )


def _sections(words: str) -> tuple[str, ...]:
    """Raises RequestError for a word that is no section."""
    known = (*SECTIONS, *NOT_HERE)
    asked = [word.strip() for word in words.split(",") if word.strip()]
    for word in asked:
        if word not in (*known, "all"):
            raise RequestError(
                f"include: there is no section {word[:100]!r}; there are {', '.join(known)}, all",
                code="invalid_value",
                param="include",
            )
    return known if "all" in asked or not asked else tuple(asked)
