"""The routes of the server."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, Router

from trunkline import __version__
from trunkline.engine.fields import Number, Rule, read_fields
from trunkline.engine.frontend import Frontend, GenerationRequest
from trunkline.messages import Stats
from trunkline.metrics.prometheus import CONTENT_TYPE, Metrics
from trunkline.server.call import Call, Json, ServedModel
from trunkline.server.chat import parse_chat
from trunkline.server.completions import parse_completion
from trunkline.server.fields import ABORT_FIELDS, DETOKENIZE_FIELDS, TOKENIZE_FIELDS
from trunkline.server.generate import parse_generate
from trunkline.server.http import Gate, json_response, read_json
from trunkline.server.respond import generation
from trunkline.types import RequestError, SamplingParams

PROBE_TIME = 20.0  # seconds in which /health_generate must have its token
FLUSH_WAIT = 600.0  # most seconds that /flush_cache waits for idleness
STATS_TIME = 2.0  # seconds that /metrics waits for the core

# Open even when an API key is set: what probes and scrapers need; they show no user data.
OPEN_PATHS = frozenset({"/health", "/health_generate", "/ready", "/metrics"})


def build_app(frontend: Frontend, model: ServedModel, metrics: Metrics) -> Gate:
    """The ASGI application."""
    handlers = _Handlers(frontend, model, metrics)
    simple: Mapping[str, tuple[Callable[[Request], Any], list[str]]] = {
        "/": (handlers.index, ["GET"]),
        "/health": (handlers.health, ["GET"]),
        "/ready": (handlers.health, ["GET"]),
        "/health_generate": (handlers.health_generate, ["GET"]),
        "/metrics": (handlers.metrics, ["GET"]),
        "/v1/models": (handlers.models, ["GET"]),
        "/v1/models/{id:path}": (handlers.one_model, ["GET"]),
        "/model_info": (handlers.model_info, ["GET"]),
        "/get_model_info": (handlers.model_info, ["GET"]),
        "/server_info": (handlers.server_info, ["GET"]),
        "/get_server_info": (handlers.server_info, ["GET"]),
        "/flush_cache": (handlers.flush_cache, ["GET", "POST"]),
        "/abort_request": (handlers.abort_request, ["POST"]),
        "/tokenize": (handlers.tokenize, ["POST"]),
        "/v1/tokenize": (handlers.tokenize, ["POST"]),
        "/detokenize": (handlers.detokenize, ["POST"]),
        "/v1/detokenize": (handlers.detokenize, ["POST"]),
    }
    generating: Mapping[str, tuple[Callable[[Json, ServedModel], Call], list[str]]] = {
        "/v1/chat/completions": (parse_chat, ["POST"]),
        "/v1/completions": (parse_completion, ["POST"]),
        "/generate": (parse_generate, ["POST", "PUT"]),
    }
    routes = [Route(path, handler, methods=methods) for path, (handler, methods) in simple.items()]
    routes += [
        Route(path, generation(parse, model, frontend, metrics), methods=methods)
        for path, (parse, methods) in generating.items()
    ]
    return Gate(Router(routes, redirect_slashes=False), OPEN_PATHS, frontend.config.server.api_key, metrics)


class _Handlers:
    """Routes that answer at once."""

    def __init__(self, frontend: Frontend, model: ServedModel, metrics: Metrics) -> None:
        self._frontend = frontend
        self._model = model
        self._metrics = metrics

    async def index(self, request: Request) -> Response:
        return json_response(
            {
                "server": "trunkline",
                "version": __version__,
                "model": self._model.name,
                "api": "/v1",
                "health": "/health",
            }
        )

    # ------------------------------------------------------------------ health and metrics
    async def health(self, request: Request) -> Response:
        """200 only while the engine makes progress (P10)."""
        self._frontend.check_health()
        return json_response({"status": "ok"})

    async def health_generate(self, request: Request) -> Response:
        """200 when a token could be generated just now."""
        probe = GenerationRequest(
            rid=f"health-{uuid.uuid4().hex}",
            prompt=[0],
            params=SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True),
        )
        try:
            async with asyncio.timeout(PROBE_TIME), aclosing(self._frontend.generate(probe)) as chunks:
                async for _ in chunks:
                    pass
        except TimeoutError:
            raise RequestError(
                f"no token within {PROBE_TIME:g} s", code="engine_stalled", status=503
            ) from None
        return json_response({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        stats = await self._stats()
        return Response(self._metrics.exposition(stats), media_type=CONTENT_TYPE)

    async def _stats(self) -> Stats | None:
        """The core's figures; None while it can't answer."""
        try:
            async with asyncio.timeout(STATS_TIME):
                return await self._frontend.client.stats()
        except (RequestError, TimeoutError):
            return None

    # ------------------------------------------------------------------ information
    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._model_card()]})

    async def one_model(self, request: Request) -> Response:
        self._model.check_name(request.path_params["id"])
        return json_response(self._model_card())

    def _model_card(self) -> Json:
        return {
            "id": self._model.name,
            "object": "model",
            "created": self._model.created,
            "owned_by": "trunkline",
            "root": self._model.name,
            "parent": None,
            "max_model_len": self._frontend.ready.max_context,
        }

    async def model_info(self, request: Request) -> Response:
        config = self._frontend.config.model
        return json_response(
            {
                "model_path": config.path,
                "served_model_name": config.served_model_name,
                "tokenizer_path": config.tokenizer_path or config.path,
                "architectures": [self._model.architecture],
                "is_generation": True,
                "preferred_sampling_params": dict(self._model.defaults),
                "weight_version": config.weight_version,
                "load_format": config.load_format,
                "has_image_understanding": False,
                "has_audio_understanding": False,
            }
        )

    async def server_info(self, request: Request) -> Response:
        stats = await self._stats()
        states = {} if stats is None else {**stats.gauges, **stats.counters}
        return json_response(
            {"version": __version__, **self._frontend.describe(), "internal_states": [states]}
        )

    # ------------------------------------------------------------------ control
    async def flush_cache(self, request: Request) -> Response:
        """`?timeout=S` waits so long for the engine to be idle."""
        query = read_fields({"timeout": Number(0, FLUSH_WAIT)}, _numbers(request))
        deadline = time.monotonic() + query.get("timeout", 0.0)
        done = await self._frontend.client.flush_cache()
        while not done.ok and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
            done = await self._frontend.client.flush_cache()
        if not done.ok:
            raise RequestError(f"the cache was not flushed: {done.message}", code="engine_busy")
        return PlainTextResponse(f"cache flushed: {done.message}\n")

    async def abort_request(self, request: Request) -> Response:
        fields = await _fields(request, ABORT_FIELDS)
        if fields.get("abort_all"):
            await self._frontend.client.abort_all()
        elif "rid" in fields:
            await self._frontend.abort(fields["rid"])
        else:
            raise RequestError("give rid, or abort_all: true", code="missing_field", param="rid")
        return json_response({})

    async def tokenize(self, request: Request) -> Response:
        fields = await _fields(request, TOKENIZE_FIELDS)
        self._model.check_name(fields.get("model"))
        text = fields.get("prompt", fields.get("text"))
        if text is None:
            raise RequestError("prompt is missing", code="missing_field", param="prompt")
        special = fields.get("add_special_tokens", True)
        tokens = await self._model.tokenizer.encode_async(text, add_special_tokens=special)
        limit = self._frontend.ready.max_context
        return json_response({"tokens": tokens, "count": len(tokens), "max_model_len": limit})

    async def detokenize(self, request: Request) -> Response:
        fields = await _fields(request, DETOKENIZE_FIELDS)
        self._model.check_name(fields.get("model"))
        if "tokens" not in fields:
            raise RequestError("tokens is missing", code="missing_field", param="tokens")
        skip = fields.get("skip_special_tokens", True)
        decode = partial(self._model.tokenizer.decode, skip_special_tokens=skip)
        return json_response({"text": await asyncio.to_thread(decode, fields["tokens"])})


def _numbers(request: Request) -> dict[str, float | str]:
    """The query's parameters, numbers as such."""
    found: dict[str, float | str] = {}
    for name, text in request.query_params.items():
        try:
            found[name] = float(text)
        except ValueError:
            found[name] = text
    return found


async def _fields(request: Request, table: Mapping[str, Rule]) -> dict[str, Any]:
    return read_fields(table, await read_json(request))
