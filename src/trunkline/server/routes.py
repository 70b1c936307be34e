"""All routes of the server."""

from __future__ import annotations

from pathlib import Path

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
    ollama,
    page,
    parsing,
    responses,
    scores,
    sessions,
    tokens,
    vectors,
)
from trunkline.server.call import ServedModel
from trunkline.server.endpoint import Endpoint, Parts
from trunkline.server.gate import Gate
from trunkline.server.storage import Storage

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
)


def all_endpoints(parts: Parts) -> list[Endpoint]:
    """A module of routes is added to MODULES, nowhere else."""
    return [endpoint for module in MODULES for endpoint in module.endpoints(parts)]


def build_app(frontend: Frontend, model: ServedModel, metrics: Metrics) -> Gate:
    """The ASGI application."""
    frontend.journal.observers = (metrics,)
    config = frontend.config.server
    keeps = config.file_storage_path and config.file_storage_bytes
    storage = Storage(Path(config.file_storage_path), config.file_storage_bytes) if keeps else None
    parts = Parts(frontend=frontend, model=model, metrics=metrics, storage=storage)
    return Gate(all_endpoints(parts), config, metrics, parts.jobs)
