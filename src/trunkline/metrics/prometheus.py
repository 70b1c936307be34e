"""Prometheus metrics. Names are SGLang's with the prefix `trunkline:`; aliases with its own can be had.

Counters of requests and tokens are fed from the chunks that make up the responses, so that sums over these
equal them (P20); those of steps, pages and grammars come from the core.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from trunkline.config.schema import ObserveConfig
from trunkline.engine.frontend import Chunk
from trunkline.engine.journal import Completion, Record
from trunkline.messages import Stats
from trunkline.metrics.load import CORE_COUNTERS, CORE_GAUGES, Throughput, core_counters, core_gauges

PREFIX = "trunkline:"
SHARED_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # what a process counts is then kept in files of this folder
ALIASES: Mapping[str, str] = {"sglang": "sglang:"}
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
_WHOLE_REQUEST = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_STAGE = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TOKENS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
STAGES = ("tokenize", "grammar", "queue", "prefill", "decode")


class Metrics:
    """All metrics of one server, in a registry of their own. Observes the journal (`engine/journal.py`)."""

    def __init__(
        self, model_name: str, observe: ObserveConfig | None = None, shared: str | None = None
    ) -> None:
        """`shared`: the folder in which processes keep what they count, dead ones too (SHARED_VARIABLE): what
        is told is the sum."""
        observe = observe or ObserveConfig()
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model_name}
        self._alias = ALIASES.get(observe.metrics_aliases)
        self._core = _CoreCollector(self._labels, since_start=shared is None)
        self._summed = self._registry
        if shared is not None:
            self._summed = CollectorRegistry()
            MultiProcessCollector(self._summed, shared)  # type: ignore[no-untyped-call]
            self._summed.register(self._core)
        self._registry.register(self._core)
        self._requests = self._counter("num_requests", "Completions started")
        self._structured = self._counter("num_so_requests", "Completions with structured output")
        self._aborted = self._counter("num_aborted_requests", "Completions that ended without their result")
        self._prompt = self._counter("prompt_tokens", "Prompt tokens, as in usage")
        self._generated = self._counter("generation_tokens", "Generated tokens, as in usage")
        self._cached = self._counter("cached_tokens", "Prompt tokens from the prefix cache, as in usage")
        self._forced = self._counter(
            "forced_tokens", "Generated tokens that a grammar dictated: no step chose them"
        )
        first = observe.first_token_buckets or _FIRST_TOKEN
        between = observe.between_tokens_buckets or _BETWEEN_TOKENS
        whole = observe.request_buckets or _WHOLE_REQUEST
        self._first_token = self._histogram("time_to_first_token_seconds", "Request to first token", first)
        self._between = self._histogram("inter_token_latency_seconds", "Time between tokens", between)
        self._latency = self._histogram("e2e_request_latency_seconds", "Request to last token", whole)
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time between the tokens of a completion", between
        )
        self._queue_time = self._histogram("queue_time_seconds", "Wait for admission", _STAGE)
        stages = Histogram(
            PREFIX + "per_stage_req_latency_seconds", "Time in each stage of a completion",
            ["model_name", "stage"], buckets=_STAGE, registry=self._registry,
        )  # fmt: skip
        self._stages = {stage: stages.labels(model_name=model_name, stage=stage) for stage in STAGES}
        self._prompt_sizes = self._histogram("prompt_tokens_histogram", "Prompt tokens of a prompt", _TOKENS)
        self._uncached_sizes = self._histogram(
            "uncached_prompt_tokens_histogram", "Prompt tokens that were computed", _TOKENS
        )
        self._output_sizes = self._histogram(
            "generation_tokens_histogram", "Generated tokens of a completion", _TOKENS
        )
        self._http = Counter(
            PREFIX + "http_requests", "Answered HTTP requests", ["method", "route", "status"],
            registry=self._registry,
        )  # fmt: skip
        self._http_active = Gauge(
            PREFIX + "http_requests_active", "HTTP requests in progress", registry=self._registry,
            multiprocess_mode="livesum",
        )  # fmt: skip

    def _counter(self, name: str, about: str) -> Counter:
        family = Counter(PREFIX + name, about, ["model_name"], registry=self._registry)
        return family.labels(**self._labels)

    def _histogram(self, name: str, about: str, buckets: Sequence[float]) -> Histogram:
        family = Histogram(PREFIX + name, about, ["model_name"], buckets=buckets, registry=self._registry)
        return family.labels(**self._labels)

    # ------------------------------------------------------------------ calls
    def begun(self, record: Record) -> None:
        self._requests.inc(len(record.completions))
        structured = {i for i, prompt in enumerate(record.prompts) if prompt.grammar is not None}
        if structured:
            self._structured.inc(sum(one.prompt in structured for one in record.completions))

    def news(self, record: Record, completion: Completion, chunk: Chunk, now: float) -> None:
        count = len(chunk.token_ids)
        if count:
            self._generated.inc(count)
            if completion.first_token is None:
                self._first_token.observe(now - record.started)
            else:
                pause = (now - completion.last_token) / count
                for _ in range(count):
                    self._between.observe(pause)
        if chunk.timing is not None:
            self._queue_time.observe(chunk.timing.admitted - chunk.timing.arrived)
        if chunk.finish is not None and chunk.finish.kind != "abort":
            self._finished(record, completion, now)

    def _finished(self, record: Record, completion: Completion, now: float) -> None:
        self._latency.observe(now - record.started)
        self._output_sizes.observe(completion.num_tokens)
        first = now if completion.first_token is None else completion.first_token
        if completion.num_tokens > 1:
            self._per_token.observe((now - first) / (completion.num_tokens - 1))
        timing = completion.timing
        if timing is None:
            return
        self._stages["tokenize"].observe(max(0.0, timing.arrived - record.started))
        if record.prompts[completion.prompt].grammar is not None:
            self._stages["grammar"].observe(timing.ready - timing.arrived)
        self._stages["queue"].observe(timing.admitted - timing.ready)
        self._stages["prefill"].observe(timing.first_token - timing.admitted)
        self._stages["decode"].observe(max(0.0, now - timing.first_token))

    def over(self, record: Record) -> None:
        usage = record.usage
        self._prompt.inc(usage.prompt_tokens)
        self._cached.inc(usage.cached_tokens)
        self._forced.inc(usage.forced_tokens)
        lost = sum(one.finish is None or one.finish.kind == "abort" for one in record.completions)
        self._aborted.inc(lost)
        for position, prompt in enumerate(record.prompts):
            if usage.has_prompt(position):
                self._prompt_sizes.observe(prompt.num_tokens)
                self._uncached_sizes.observe(prompt.num_tokens - usage.cached_of(position))

    def gen_throughput(self, stats: Stats) -> float:
        """Generated tokens a second, over the last looks at the core."""
        return self._core.update(stats)["gen_throughput"]

    def core_exposition(self, stats: Stats) -> bytes:
        """Of the core's gauges and counters alone."""
        self._core.update(stats)
        registry = CollectorRegistry()
        registry.register(self._core)
        return generate_latest(registry)

    # ------------------------------------------------------------------ HTTP
    def http_started(self) -> None:
        self._http_active.inc()

    def http_ended(self, method: str, route: str, status: int) -> None:
        """`route` is the pattern of a known route, or "unknown": a client can't make new series."""
        self._http_active.dec()
        self._http.labels(method=method, route=route, status=str(status)).inc()

    def exposition(self, stats: Stats | None) -> bytes:
        """The text that Prometheus reads; figures of the core are as in `stats`, or as last known."""
        if stats is not None:
            self._core.update(stats)
        text = generate_latest(self._summed)
        if self._alias is not None:
            text += text.replace(PREFIX.encode(), self._alias.encode())
        return text


def forget_gauges(folder: str, pid: int) -> None:
    """Of a dead process nothing is in progress any more; what it has counted stays."""
    mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]


class _CoreCollector(Collector):
    """Gauges and counters of the core, as it told them last."""

    def __init__(self, labels: Mapping[str, str], since_start: bool) -> None:
        self._labels = labels
        self._gauges: dict[str, float] = {}
        self._counters: dict[str, float] = {}
        self._throughput = Throughput(since_start)

    def update(self, stats: Stats) -> Mapping[str, float]:
        """Returns the gauges."""
        self._gauges = {
            **core_gauges(stats),
            "gen_throughput": self._throughput.rate(stats.counters["generated_tokens"]),
        }
        self._counters = core_counters(stats)
        return self._gauges

    def collect(self) -> Iterable[Metric]:
        names, values = list(self._labels), list(self._labels.values())
        for name, value in self._gauges.items():
            gauge = GaugeMetricFamily(PREFIX + name, CORE_GAUGES[name], labels=names)
            gauge.add_metric(values, value)
            yield gauge
        for name, value in self._counters.items():
            counter = CounterMetricFamily(PREFIX + name, CORE_COUNTERS[name], labels=names)
            counter.add_metric(values, value)
            yield counter
