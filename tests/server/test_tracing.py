"""Traces: the spans of a call, their times and attributes, and the caller's trace continued."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from tests.server.conftest import http_client, make_app
from tests.server.fake_client import FakeClient
from tests.server.live import Server
from trunkline.config.schema import EngineConfig, ObserveConfig
from trunkline.engine.offline import Engine
from trunkline.server.gate import Gate
from trunkline.server.tracing import Tracing, tracing_of
from trunkline.text.tokenizer import Tokenizer
from trunkline.types import RequestError, Timing

pytest.importorskip("opentelemetry.sdk")

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "temperature": 0.5, "seed": 3}


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(spans: InMemorySpanExporter) -> TracerProvider:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return provider


def watch(app: Gate, provider: TracerProvider) -> Gate:
    journal = app.frontend.journal
    journal.observers = (*journal.observers, Tracing(journal, "tiny", provider))
    return app


async def test_spans_of_a_chat(
    app: Gate, client: FakeClient, provider: TracerProvider, spans: InMemorySpanExporter
) -> None:
    async with http_client(watch(app, provider)) as http:
        await http.post("/v1/chat/completions", json={**CHAT, "n": 2}, headers={"traceparent": PARENT})
    assert client.added[0].trace
    found: list[Any] = list(spans.get_finished_spans())
    (root,) = [span for span in found if span.name == "chat tiny"]
    assert f"{root.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{root.parent.span_id:016x}" == PARENT.split("-")[2]
    wanted = {
        "gen_ai.operation.name": "chat", "gen_ai.request.temperature": 0.5, "gen_ai.request.seed": 3,
        "gen_ai.usage.output_tokens": 10, "gen_ai.response.finish_reasons": ("length", "length"),
        "http.response.status_code": 200,
    }  # fmt: skip
    assert {name: root.attributes[name] for name in wanted} == wanted
    below = [span for span in found if span is not root]
    assert sorted(span.name for span in below) == sorted(
        ["queue", "prefill chunk", "decode", "detokenize"] * 2
    )
    for span in below:
        assert span.parent.span_id == root.context.span_id
        assert root.start_time - 10**6 <= span.start_time <= span.end_time <= root.end_time + 10**6


async def test_a_call_that_failed(
    app: Gate, client: FakeClient, provider: TracerProvider, spans: InMemorySpanExporter
) -> None:
    client.dies_after = 2
    async with http_client(watch(app, provider)) as http:
        await http.post("/v1/chat/completions", json=CHAT)
    (root,) = [span for span in spans.get_finished_spans() if span.name == "chat tiny"]
    assert root.attributes is not None and root.attributes["error.type"] == "engine_dead"
    assert not root.status.is_ok and root.parent is None


async def test_nothing_is_traced_unasked(http: httpx.AsyncClient, client: FakeClient) -> None:
    await http.post("/v1/chat/completions", json=CHAT)
    assert not client.added[0].trace


def test_the_core_tells_each_chunk() -> None:
    with Engine(page_size=4, max_total_tokens=1024, chunked_prefill_size=8, max_running_requests=4,
                device="cpu", cpu_threads=1) as engine:  # fmt: skip
        engine._frontend.journal.trace = True
        answer = engine.generate(input_ids=list(range(5, 25)), sampling_params={"max_new_tokens": 3})
        assert isinstance(answer, dict)
        record = engine._frontend.journal.find(answer["meta_info"]["id"])
        assert record is not None
        timing = record.completions[0].timing
        assert isinstance(timing, Timing)
        assert [tokens for _, _, tokens in timing.chunks] == [8, 8, 4]
        times = [timing.arrived, timing.ready, timing.admitted]
        times += [at for start, end, _ in timing.chunks for at in (start, end)] + [timing.first_token]
        assert times == sorted(times)
        engine._frontend.journal.trace = False
        answer = engine.generate(input_ids=list(range(5, 25)), sampling_params={"max_new_tokens": 3})
        assert isinstance(answer, dict)
        record = engine._frontend.journal.find(answer["meta_info"]["id"])
        assert record is not None and record.completions[0].timing is not None
        assert record.completions[0].timing.chunks == []


def test_the_flags_make_an_exporter(app: Gate, config: EngineConfig) -> None:
    assert tracing_of(config, app.frontend.journal) is None
    on = msgspec.structs.replace(config, observe=ObserveConfig(trace=True, otlp_endpoint="localhost:1"))
    tracing = tracing_of(on, app.frontend.journal)
    assert tracing is not None
    tracing.close()


def test_without_the_packages(
    client: FakeClient, tokenizer: Tokenizer, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(RequestError) as caught:
        make_app(client, tokenizer, config, observe=ObserveConfig(trace=True))
    assert caught.value.code == "missing_package"


# ---------------------------------------------------------------------- on the wire
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what an exporter sends, as OTLP over gRPC."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:
        self.sent.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self) -> list[Any]:
        """All spans; each must say who sent it."""
        found = []
        for resource in [one for request in self.sent for one in request.resource_spans]:
            assert attributes_of(resource.resource)["service.name"] == "trunkline"
            for scope in resource.scope_spans:
                assert scope.scope.name == "trunkline"
                found += scope.spans
        return found

    def close(self) -> None:
        self._server.stop(None).wait()


def attributes_of(message: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        inner = getattr(value, kind)
        return [plain(one) for one in inner.values] if kind == "array_value" else inner

    return {one.key: plain(one.value) for one in message.attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def test_a_collector_gets_the_spans_of_a_running_server(tiny_model: Path, collector: Collector) -> None:
    server = Server(
        tiny_model, "--enable-trace", "--otlp-traces-endpoint", collector.endpoint,
        "--chunked-prefill-size", "16",
    )  # fmt: skip
    prompt = {"prompt": list(range(5, 45)), "max_tokens": 6, "ignore_eos": True, "temperature": 0}
    headers = {"traceparent": PARENT, "x-request-id": "mine"}
    for stream in (False, True):
        answer = server.http.post("/v1/completions", json={**prompt, "stream": stream}, headers=headers)
        assert answer.status_code == 200
    refused = server.http.post("/v1/completions", json={**prompt, "max_tokens": 10**6}, headers=headers)
    assert refused.status_code == 400
    code, log = server.stop()  # what has not been sent is sent at the end
    assert code == 0 and "Traceback" not in log, log
    spans = collector.spans()
    roots = [span for span in spans if span.parent_span_id.hex() == PARENT.split("-")[2]]
    assert {span.trace_id.hex() for span in spans} == {PARENT.split("-")[1]}
    assert len({span.span_id for span in spans}) == len(spans) and len(roots) == 2
    for root in roots:
        told = attributes_of(root)
        wanted = {
            "gen_ai.operation.name": "text_completion", "gen_ai.usage.input_tokens": 40,
            "gen_ai.usage.output_tokens": 6, "gen_ai.request.max_tokens": 6, "http.route": "/v1/completions",
            "gen_ai.response.finish_reasons": ["length"], "http.response.status_code": 200,
            "trunkline.request_id": "mine",
        }  # fmt: skip
        assert {name: told[name] for name in wanted} == wanted
        below = sorted(
            (span for span in spans if span.parent_span_id == root.span_id),
            key=lambda span: span.start_time_unix_nano,
        )
        stages = [(span.name, attributes_of(span).get("tokens")) for span in below]
        computed = 40 - told["trunkline.cached_tokens"]
        chunks = [min(16, computed - at) for at in range(0, computed, 16)]
        assert stages == [
            ("queue", None),
            *(("prefill chunk", size) for size in chunks),
            ("decode", 6),
            ("detokenize", None),
        ]
        for earlier, later in itertools.pairwise(below[:-1]):
            assert earlier.end_time_unix_nano <= later.start_time_unix_nano + 10**6
        assert root.start_time_unix_nano <= below[0].start_time_unix_nano + 10**6
        assert max(span.end_time_unix_nano for span in below) <= root.end_time_unix_nano + 10**6
        assert below[-1].end_time_unix_nano == below[-2].end_time_unix_nano
    assert len(spans) == sum(1 + len([s for s in spans if s.parent_span_id == r.span_id]) for r in roots)
