"""Prometheus metrics. Names are SGLang's with the prefix `trunkline:`.

Counters are fed from the chunks that make up the responses, so that sums over responses equal them (P20).
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from trunkline.engine.frontend import Chunk
from trunkline.engine.usage import Usage
from trunkline.messages import Stats

PREFIX = "trunkline:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
_WHOLE_REQUEST = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)

# What the core's statistics become.
_CORE_GAUGES: Mapping[str, str] = {
    "num_running_reqs": "Requests that hold KV pages now",
    "num_queue_reqs": "Requests that wait for admission",
    "num_grammar_queue_reqs": "Requests that wait for their grammar to be compiled",
    "num_used_tokens": "KV pool: tokens of pages in use",
    "max_total_num_tokens": "KV pool: tokens that it holds",
    "token_usage": "KV pool: share in use",
    "cache_hit_rate": "Share of prompt tokens taken from the prefix cache since start",
    "new_token_ratio": "Share of the asked-for output that admission reserves",
    "num_retracted_requests": "Times a request was preempted since start",
}


def _core_values(stats: Stats) -> dict[str, float]:
    gauges, counters = stats.gauges, stats.counters
    return {
        "num_running_reqs": gauges["running"],
        "num_queue_reqs": gauges["waiting"],
        "num_grammar_queue_reqs": gauges["compiling"],
        "num_used_tokens": gauges["pages_in_use"] * gauges["page_size"],
        "max_total_num_tokens": gauges["pages_total"] * gauges["page_size"],
        "token_usage": gauges["pages_in_use"] / gauges["pages_total"],
        "cache_hit_rate": counters["cached_tokens"] / max(counters["prompt_tokens"], 1),
        "new_token_ratio": gauges["new_token_ratio"],
        "num_retracted_requests": counters["retractions"],
    }


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        labels = {"model_name": model_name}

        def counter(name: str, about: str) -> Counter:
            family = Counter(PREFIX + name, about, ["model_name"], registry=self._registry)
            return family.labels(**labels)

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(PREFIX + name, about, ["model_name"], buckets=buckets, registry=self._registry)
            return family.labels(**labels)

        self._requests = counter("num_requests", "Completions started")
        self._aborted = counter("num_aborted_requests", "Completions that ended without their result")
        self._token_totals = (
            counter("prompt_tokens", "Prompt tokens, as in usage"),
            counter("generation_tokens", "Generated tokens, as in usage"),
            counter("cached_tokens", "Prompt tokens taken from the prefix cache, as in usage"),
            counter("forced_tokens", "Generated tokens that a grammar dictated: no step chose them"),
        )
        self._first_token = histogram("time_to_first_token_seconds", "Request to first token", _FIRST_TOKEN)
        self._between = histogram("inter_token_latency_seconds", "Time between tokens", _BETWEEN_TOKENS)
        self._latency = histogram("e2e_request_latency_seconds", "Request to last token", _WHOLE_REQUEST)
        self._http = Counter(
            PREFIX + "http_requests",
            "Answered HTTP requests",
            ["method", "route", "status"],
            registry=self._registry,
        )
        self._http_active = Gauge(
            PREFIX + "http_requests_active", "HTTP requests in progress", registry=self._registry
        )
        self._core = {
            name: Gauge(PREFIX + name, about, ["model_name"], registry=self._registry).labels(**labels)
            for name, about in _CORE_GAUGES.items()
        }

    async def watch(
        self, chunks: AsyncGenerator[Chunk, None], n: int, completions: int
    ) -> AsyncGenerator[Chunk, None]:
        """Pass chunks on, counting. `n`: completions per prompt; `completions`: of all prompts."""
        started = time.monotonic()
        usage, last_token, unfinished = Usage(n), dict[int, float](), completions
        counts = (0, 0, 0, 0)
        self._requests.inc(completions)
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    before = counts
                    usage.add(chunk)
                    counts = (
                        usage.prompt_tokens,
                        usage.completion_tokens,
                        usage.cached_tokens,
                        usage.forced_tokens,
                    )
                    for total, old, new in zip(self._token_totals, before, counts, strict=True):
                        if new != old:
                            total.inc(new - old)
                    self._time_tokens(chunk, started, last_token)
                    if chunk.finish is not None and chunk.finish.kind != "abort":
                        unfinished -= 1
                        self._latency.observe(time.monotonic() - started)
                    yield chunk
        finally:
            self._aborted.inc(unfinished)

    def _time_tokens(self, chunk: Chunk, started: float, last_token: dict[int, float]) -> None:
        if not chunk.token_ids:
            return
        now = time.monotonic()
        before = last_token.get(chunk.index)
        if before is None:
            self._first_token.observe(now - started)
        else:
            for _ in chunk.token_ids:
                self._between.observe((now - before) / len(chunk.token_ids))
        last_token[chunk.index] = now

    def http_started(self) -> None:
        self._http_active.inc()

    def http_ended(self, method: str, route: str, status: int) -> None:
        """`route` is the pattern of a known route, or "unknown": a client can't make new series."""
        self._http_active.dec()
        self._http.labels(method=method, route=route, status=str(status)).inc()

    def exposition(self, stats: Stats | None) -> bytes:
        """The text that Prometheus reads; gauges of the core are as in `stats`, or as last known."""
        if stats is not None:
            for name, value in _core_values(stats).items():
                self._core[name].set(value)
        return generate_latest(self._registry)
