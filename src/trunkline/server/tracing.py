"""OpenTelemetry traces: one span for each call, with spans below it for where its time went.

Needs the extra `trunkline[otel]`. Spans are made when a call has ended, from the times in its record, so that
nothing is done for them while tokens flow. Attributes are those of the GenAI conventions (`gen_ai.*`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trunkline import __version__
from trunkline.config.schema import EngineConfig
from trunkline.engine.frontend import Chunk
from trunkline.engine.journal import Completion, Journal, Record
from trunkline.types import RequestError

OPERATIONS: Mapping[str, str] = {
    "/v1/chat/completions": "chat",
    "/v1/embeddings": "embeddings",
}  # others complete text


class Tracing:
    """Observes the journal, and has the core report each step that computes a prompt."""

    def __init__(self, journal: Journal, model: str, provider: Any) -> None:
        """`provider`: an OpenTelemetry TracerProvider."""
        journal.trace = True
        self._model = model
        self._provider = provider
        self._tracer = provider.get_tracer("trunkline", __version__)

    def begun(self, record: Record) -> None:
        pass

    def news(self, record: Record, completion: Completion, chunk: Chunk, now: float) -> None:
        pass

    def over(self, record: Record) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if not record.prompts:
            return
        zero = record.received - record.started  # Unix time at the monotonic clock's zero

        def at(seconds: float) -> int:
            return round((zero + seconds) * 1e9)

        operation = OPERATIONS.get(record.origin.route, "text_completion")
        root = self._tracer.start_span(
            f"{operation} {self._model}",
            context=TraceContextTextMapPropagator().extract(dict(record.origin.headers)),
            kind=SpanKind.SERVER,
            start_time=at(record.started),
            attributes=self._attributes(record, operation),
        )
        if record.error is not None:
            root.set_attribute("error.type", record.error.code)
            root.set_status(Status(StatusCode.ERROR, record.error.code))
        for index, completion in enumerate(record.completions):
            self._stages(root, index, completion, at)
        root.end(at(record.ended or record.started))

    def _attributes(self, record: Record, operation: str) -> dict[str, Any]:
        params = record.prompts[0].used
        ends = [one.finish.kind for one in record.completions if one.finish is not None]
        return {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "trunkline",
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.response.id": record.key,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": params.top_k,
            "gen_ai.request.max_tokens": params.max_new_tokens or 0,
            "gen_ai.request.seed": params.sampling_seed or 0,
            "gen_ai.request.choice.count": params.n,
            "gen_ai.usage.input_tokens": record.usage.prompt_tokens,
            "gen_ai.usage.output_tokens": record.usage.completion_tokens,
            "gen_ai.response.finish_reasons": ends,
            "http.route": record.origin.route,
            "http.response.status_code": record.status,
            "trunkline.request_id": record.origin.request_id,
            "trunkline.cached_tokens": record.usage.cached_tokens,
        }

    def _stages(self, root: Any, index: int, completion: Completion, at: Any) -> None:
        from opentelemetry.trace import set_span_in_context

        timing, context = completion.timing, set_span_in_context(root)
        if timing is None:
            return
        end = completion.ended or completion.last_token or timing.first_token

        def span(name: str, start: float, stop: float, **attributes: Any) -> None:
            made = self._tracer.start_span(
                name, context=context, start_time=at(start), attributes={"completion": index, **attributes}
            )
            made.end(at(max(start, stop)))

        if timing.ready > timing.arrived:
            span("grammar", timing.arrived, timing.ready)
        span("queue", timing.ready, timing.admitted)
        for start, stop, tokens in timing.chunks:
            span("prefill chunk", start, stop, tokens=tokens)
        span(
            "decode",
            timing.first_token,
            end,
            tokens=completion.num_tokens,
            retractions=completion.retractions,
        )
        # What it took in all, as one piece at the end: it happens token by token beside decoding.
        span("detokenize", end - completion.detokenize, end)

    def close(self) -> None:
        """Send what has not been sent."""
        self._provider.shutdown()


def tracing_of(config: EngineConfig, journal: Journal) -> Tracing | None:
    """As the flags ask for it. Raises RequestError when the packages are not installed."""
    if not config.observe.trace:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise RequestError(
            "--enable-trace needs OpenTelemetry: pip install 'trunkline[otel]'",
            code="missing_package",
            param="--enable-trace",
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": "trunkline"}))
    exporter = OTLPSpanExporter(endpoint=config.observe.otlp_endpoint, insecure=True)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(journal, config.model.served_model_name, provider)
