"""What the engine is doing now, for whoever watches: the radix tree, requests, steps, counters.

Asked for again and again (each answer is whole), so nothing runs while nobody asks. However many watch, the
core is asked at most once in `FRESH` seconds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response

from trunkline.engine.fields import Number, Rule
from trunkline.messages import RequestState, Snapshot, TreeEdge
from trunkline.server.call import Json
from trunkline.server.endpoint import Access, Endpoint, Parts
from trunkline.server.http import json_response, read_query
from trunkline.types import RequestError

FRESH = 0.1  # seconds for which an answer of the core is used
CORE_TIME = 5.0  # seconds that the core has to answer
QUERY: Mapping[str, Rule] = {"since": Number(-1)}  # only steps after this one


def endpoints(parts: Parts) -> list[Endpoint]:
    own = _Live(parts)
    get = ("GET",)
    return [
        Endpoint("/v1/live", get, own.counts, Access.USER, query=QUERY, summary="The engine now, in numbers"),
        Endpoint(
            "/v1/live/details",
            get,
            own.details,
            Access.ADMIN,
            query=QUERY,
            summary="The engine now, with request ids and the beginnings of cached texts",
        ),
    ]


class _Live:
    def __init__(self, parts: Parts) -> None:
        self._client = parts.frontend.client
        self._tokenizer = parts.model.tokenizer
        self._taken = 0.0
        self._asking: asyncio.Future[Snapshot] | None = None

    async def counts(self, request: Request) -> Response:
        since, snapshot = read_query(QUERY, request).get("since", -1), await self._snapshot()
        return json_response(_as_json(snapshot, since, [_edge(e) for e in snapshot.edges], _states(snapshot)))

    async def details(self, request: Request) -> Response:
        """Shows what others wrote, hence the access."""
        since, snapshot = read_query(QUERY, request).get("since", -1), await self._snapshot()
        edges = await asyncio.to_thread(lambda: [self._edge_with_text(edge) for edge in snapshot.edges])
        states = [
            {**state, "rid": request.rid}
            for state, request in zip(_states(snapshot), snapshot.requests, strict=True)
        ]
        return json_response(_as_json(snapshot, since, edges, states))

    def _edge_with_text(self, edge: TreeEdge) -> Json:
        return {**_edge(edge), "text": "".join(map(self._tokenizer.token_text, edge.head))}

    async def _snapshot(self) -> Snapshot:
        now = time.monotonic()
        if self._asking is None or (self._asking.done() and now - self._taken > FRESH):
            self._taken = now
            self._asking = asyncio.ensure_future(self._client.snapshot())
        try:
            async with asyncio.timeout(CORE_TIME):
                return await asyncio.shield(self._asking)
        except TimeoutError:
            raise RequestError(
                f"the engine did not answer within {CORE_TIME:g} s: it is in a long step",
                code="engine_busy",
                status=503,
            ) from None


def _as_json(snapshot: Snapshot, since: float, edges: list[Json], states: list[Json]) -> Json:
    return {
        "now": snapshot.now,
        "gauges": snapshot.gauges,
        "counters": snapshot.counters,
        "num_edges": snapshot.num_edges,
        "edges": edges,
        "requests": states,
        "steps": [
            {
                "step": step.step,
                "ended": step.ended,
                "seconds": step.seconds,
                "prompt_tokens": step.prompt_tokens,
                "decode_tokens": step.decode_tokens,
                "rows": step.rows,
            }
            for step in snapshot.steps
            if step.step > since
        ],
    }


def _edge(edge: TreeEdge) -> Json:
    return {
        "number": edge.number,
        "parent": edge.parent,
        "tokens": edge.tokens,
        "locks": edge.locks,
        "idle": edge.idle,
        "hidden": edge.hidden,
    }


def _states(snapshot: Snapshot) -> list[Json]:
    names = [name for name in RequestState.__struct_fields__ if name != "rid"]
    return [{name: getattr(state, name) for name in names} for state in snapshot.requests]
