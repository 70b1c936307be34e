"""What is served here, and how it does: the model, the configuration, health, metrics."""

from __future__ import annotations

import asyncio
import os
import uuid
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response

from trunkline import __version__
from trunkline.config.cli import launch_command
from trunkline.engine.frontend import GenerationRequest
from trunkline.messages import Stats
from trunkline.metrics.prometheus import CONTENT_TYPE
from trunkline.server.call import Json
from trunkline.server.endpoint import Access, Endpoint, Parts
from trunkline.server.http import json_response
from trunkline.text.reasoning import name_of
from trunkline.types import RequestError, SamplingParams

PROBE_TIME = 20.0  # seconds in which /health_generate must have its token
STATS_TIME = 2.0  # seconds that /metrics waits for the core


def endpoints(parts: Parts) -> list[Endpoint]:
    own = _Info(parts)
    get = ("GET",)
    return [
        Endpoint("/health", get, own.health, Access.OPEN, summary="200 while the engine makes progress"),
        Endpoint("/ready", get, own.ready, Access.OPEN, summary="200 while requests should be sent here"),
        Endpoint(
            "/health_generate", get, own.health_generate, Access.OPEN, summary="200 when a token comes out"
        ),
        Endpoint("/metrics", get, own.metrics, Access.OPEN, summary="Figures for Prometheus"),
        Endpoint("/v1/models", get, own.models, Access.USER, summary="The models that are served"),
        Endpoint("/v1/models/{id:path}", get, own.one_model, Access.USER, summary="One of them"),
        Endpoint("/model_info", get, own.model_info, Access.USER, summary="The model, in SGLang's terms"),
        Endpoint("/get_model_info", get, own.model_info, Access.USER, summary="Same as /model_info"),
        Endpoint(
            "/server_info", get, own.server_info, Access.USER, summary="Configuration and figures, no secrets"
        ),
        Endpoint("/get_server_info", get, own.server_info, Access.USER, summary="Same as /server_info"),
    ]


class _Info:
    def __init__(self, parts: Parts) -> None:
        self._frontend = parts.frontend
        self._model = parts.model
        self._metrics = parts.metrics
        self._startup = parts.startup

    # ------------------------------------------------------------------ health and metrics
    async def health(self, request: Request) -> Response:
        """200 only while the engine makes progress (P10)."""
        self._frontend.check_health()
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        self._frontend.check_health()
        if self._frontend.draining:
            raise RequestError("the server is stopping", code="draining", status=503)
        return json_response({"status": "ok"})

    async def health_generate(self, request: Request) -> Response:
        """200 when a token could be generated just now."""
        if self._frontend.client.paused:
            raise RequestError("generation is paused (/continue_generation)", code="paused", status=503)
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
        reasoning, tools = self._model.reasoning, self._model.tools
        return json_response(
            {
                "model_path": config.path,
                "served_model_name": config.served_model_name,
                "tokenizer_path": config.tokenizer_path or config.path,
                "architectures": [self._model.architecture],
                "is_generation": True,
                "preferred_sampling_params": dict(self._model.defaults),
                "weight_version": config.weight_version,
                "reasoning_parser": None if reasoning is None else name_of(reasoning),
                "tool_call_parser": None if tools is None else tools.names[0],
                "load_format": config.load_format,
                "has_image_understanding": False,
                "has_audio_understanding": False,
            }
        )

    async def server_info(self, request: Request) -> Response:
        stats = await self._stats()
        states: dict[str, float] = {}
        if stats is not None:
            states = {**stats.gauges, **stats.counters}
            states["last_gen_throughput"] = self._metrics.gen_throughput(stats)
        return json_response(
            {
                "version": __version__,
                **self._frontend.describe(),
                "launch_command": self._startup.get("command") or launch_command(),
                "startup_time": self._startup.get("seconds"),
                "process": {"number": self._startup.get("process", 0), "pid": os.getpid()},
                "internal_states": [states],
            }
        )
