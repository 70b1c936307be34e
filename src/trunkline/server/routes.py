"""All routes of the server."""

from __future__ import annotations

from pathlib import Path

from trunkline.engine.dump import Dumper
from trunkline.engine.frontend import Frontend
from trunkline.metrics.prometheus import Metrics
from trunkline.server import (
    batches,
    chat,
    completions,
    control,
    files,
    generate,
    info,
    insight,
    live,
    messages,
    observing,
    ollama,
    page,
    parsing,
    profile,
    responses,
    scores,
    sessions,
    tokens,
    vectors,
)
from trunkline.server.call import ServedModel
from trunkline.server.endpoint import Endpoint, Parts
from trunkline.server.gate import Gate
from trunkline.server.openapi import openapi_endpoint
from trunkline.server.request_log import RequestLog
from trunkline.server.storage import Storage
from trunkline.server.tracing import tracing_of

MODULES = (
    page,
    info,
    chat,
    completions,
    responses,
    generate,
    messages,
    ollama,
    sessions,
    vectors,
    scores,
    files,
    batches,
    tokens,
    parsing,
    control,
    live,
    insight,
    observing,
    profile,
)


def all_endpoints(parts: Parts) -> list[Endpoint]:
    """A module of routes is added to MODULES, nowhere else."""
    endpoints = [endpoint for module in MODULES for endpoint in module.endpoints(parts)]
    return [*endpoints, openapi_endpoint(endpoints)]


def build_app(frontend: Frontend, model: ServedModel, metrics: Metrics) -> Gate:
    """The ASGI application."""
    journal, config = frontend.journal, frontend.config
    request_log, dumper = RequestLog(journal, config.observe), Dumper(config, journal)
    tracing = tracing_of(config, journal)
    journal.observers = (metrics, request_log, dumper, *(() if tracing is None else (tracing,)))
    path, size = config.server.file_storage_path, config.server.file_storage_bytes
    parts = Parts(
        frontend=frontend,
        model=model,
        metrics=metrics,
        request_log=request_log,
        dumper=dumper,
        storage=Storage(Path(path), size) if path and size else None,
    )
    return Gate(all_endpoints(parts), parts)
