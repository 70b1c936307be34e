"""All routes of the server."""

from __future__ import annotations

from trunkline.engine.frontend import Frontend
from trunkline.metrics.prometheus import Metrics
from trunkline.server import (
    chat,
    completions,
    control,
    generate,
    info,
    insight,
    live,
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

MODULES = (
    page,
    info,
    chat,
    completions,
    responses,
    generate,
    sessions,
    vectors,
    scores,
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
    parts = Parts(frontend=frontend, model=model, metrics=metrics)
    return Gate(all_endpoints(parts), frontend.config.server, metrics)
