"""Traces: the spans of a call, their times and attributes, and the caller's trace continued."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest

from tests.server.conftest import http_client, make_app
from tests.server.fake_client import FakeClient
from trunkline.config.schema import EngineConfig, ObserveConfig
from trunkline.engine.offline import Engine
from trunkline.server.gate import Gate
from trunkline.server.tracing import Tracing, tracing_of
from trunkline.text.tokenizer import Tokenizer
from trunkline.types import RequestError, Timing

pytest.importorskip("opentelemetry.sdk")

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
