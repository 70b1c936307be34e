"""What all routes share: bodies, errors, keys, health, load, death, disconnects (P1, P9, P10, P11, P14)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
import uvicorn

from tests.conftest import find_free_port
from tests.server.conftest import events_of, http_client, make_app
from tests.server.fake_client import FakeClient
from trunkline.config.schema import EngineConfig, ServerConfig
from trunkline.server import http as http_module
from trunkline.server.gate import Gate
from trunkline.text.tokenizer import Tokenizer
from trunkline.types import FinishReason

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}
GENERATING = [(CHAT, HI), ("/v1/completions", {"prompt": "hi"}), ("/generate", {"text": "hi"})]


# ---------------------------------------------------------------------- bodies
BAD_BODIES: list[tuple[bytes, str, str]] = [
    (b'{"a": 1,}', "invalid_json", "byte 8"),
    (b'{"a": "\xff"}', "invalid_json", "invalid UTF-8 at byte 7"),
    (b'{"a": "\\ud800"}', "invalid_json", "not valid JSON"),
    (b'{"a": "\\udc00\\ud800"}', "invalid_json", "not valid JSON"),
    (b'{"a": NaN}', "invalid_json", "byte 6"),
    (b'{"a": 1e999}', "invalid_json", "out of range"),
    (b"", "invalid_json", "ends early"),
    (b"[" * 100_000, "invalid_json", "too deeply"),
    (b'{"max_tokens": ' + b"9" * 5000 + b"}", "invalid_json", "out of range"),
    (b'{"a": 1} x', "invalid_json", "at byte"),
    (b"[1]", "invalid_type", "object"),
    (b'"hi"', "invalid_type", "object"),
]


@pytest.mark.parametrize(("route", "_body"), GENERATING)
@pytest.mark.parametrize(("data", "code", "says"), BAD_BODIES)
async def test_bad_bodies(
    http: httpx.AsyncClient, route: str, _body: Any, data: bytes, code: str, says: str
) -> None:
    response = await http.post(route, content=data)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == code and says in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


async def test_large_bodies(client: FakeClient, tokenizer: Tokenizer, config: EngineConfig) -> None:
    limited = msgspec.structs.replace(config, server=ServerConfig(max_body=100_000))

    async def pieces() -> AsyncIterator[bytes]:  # without a content-length
        for _ in range(11):
            yield b" " * 10_000

    async with http_client(make_app(client, tokenizer, limited)) as http:
        for content in (b" " * 100_001, pieces()):
            response = await http.post(CHAT, content=content)
            assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
            assert "100000" in response.text and "--max-body-size" in response.text
        messages = [{"role": "user", "content": "x" * 30_000}]
        response = await http.post(CHAT, json={"messages": messages})  # parsed in a thread
        assert response.json()["error"]["code"] == "context_length_exceeded"


async def test_a_body_that_does_not_come(app: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "BODY_TIME", 0.05)

    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)

    async with http_client(app) as http:
        response = await http.post(CHAT, content=slow())
    assert (response.status_code, response.json()["error"]["code"]) == (408, "body_timeout")


async def test_unknown_routes_and_methods(http: httpx.AsyncClient) -> None:
    response = await http.get("/v2/models")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    response = await http.get(CHAT)
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
    assert (await http.put("/generate", json={"text": "hi"})).status_code == 200


# ---------------------------------------------------------------------- health, load, death
async def test_health_is_the_engines(http: httpx.AsyncClient, client: FakeClient) -> None:
    for path in ("/health", "/ready", "/health_generate"):
        assert (await http.get(path)).status_code == 200
    client.health.ok, client.health.reason = False, "no progress for 9 s"
    for path in ("/health", "/ready", "/health_generate"):
        response = await http.get(path)
        assert response.status_code == 503 and "no progress for 9 s" in response.text
    assert (await http.get("/metrics")).status_code == 200


@pytest.mark.parametrize(("route", "body"), GENERATING)
async def test_a_dead_engine_is_a_503(
    http: httpx.AsyncClient, client: FakeClient, route: str, body: dict[str, Any]
) -> None:
    client.dies_after = 2
    first = await http.post(route, json=body)
    client.health.ok = True
    stream = await http.post(route, json={**body, "stream": True})
    later = await http.post(route, json=body)
    assert first.status_code == later.status_code == 503
    assert first.json()["error"]["code"] == later.json()["error"]["code"] == "engine_dead"
    assert later.headers["retry-after"] == "1" and "killed by the test" in later.text
    assert events_of(stream.text)[-1]["error"]["code"] == "engine_dead"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_of_the_core_has_its_own_status(
    http: httpx.AsyncClient, client: FakeClient, stream: bool
) -> None:
    client.refusal = FinishReason("abort", message="the queue is full", code="queue_full", status=429)
    response = await http.post(CHAT, json={**HI, "stream": stream})
    assert response.status_code == 429 and response.headers["retry-after"] == "1"
    assert response.json()["error"] == {
        "message": "the queue is full", "type": "rate_limit_error", "param": None, "code": "queue_full"
    }  # fmt: skip


async def test_a_full_server_refuses_at_once(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.delay = 0.05  # capacity: 12 queued + 8 running
    tasks = [asyncio.create_task(http.post(CHAT, json={**HI, "max_tokens": 5})) for _ in range(30)]
    statuses = [(await task).status_code for task in tasks]
    assert sorted(statuses) == [200] * 20 + [429] * 10
    assert (await http.post(CHAT, json=HI)).status_code == 200


async def test_our_own_faults_are_hidden_and_logged(
    http: httpx.AsyncClient, client: FakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    client.script = lambda request: 1 // 0  # type: ignore[assignment, return-value]
    response = await http.post(CHAT, json=HI)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (500, "internal_error")
    assert response.headers["x-request-id"] in error["message"]
    assert "ZeroDivision" not in response.text and "ZeroDivisionError" in caplog.text
    streamed = await http.post(CHAT, json={**HI, "stream": True})
    assert streamed.status_code == 500


async def test_one_log_line_for_each_request(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="trunkline.access")
    await http.get("/health")
    await http.get("/a%0d%0ab")
    lines = [record.getMessage() for record in caplog.records if record.name == "trunkline.access"]
    assert len(lines) == 2 and "GET /health" in lines[0] and " 200 " in lines[0]
    assert " 404 " in lines[1] and "\n" not in lines[1]


# ---------------------------------------------------------------------- abort and control
async def test_abort_request(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.delay = 0.02
    task = asyncio.create_task(http.post(CHAT, json={**HI, "rid": "r1", "n": 2}))
    other = asyncio.create_task(http.post("/generate", json={"text": "hi", "rid": "r2"}))
    await asyncio.sleep(0.1)
    assert (await http.post("/abort_request", json={"rid": "unknown"})).status_code == 200
    assert (await http.post("/abort_request", json={"rid": "r1"})).status_code == 200
    choices = (await task).json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["abort", "abort"]
    assert not other.done()
    await http.post("/abort_request", json={"abort_all": True})
    assert (await other).json()["meta_info"]["finish_reason"]["type"] == "abort"
    assert not client.live


async def test_a_live_id_is_not_taken_twice(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.delay = 0.02
    task = asyncio.create_task(http.post(CHAT, json={**HI, "rid": "same"}))
    await asyncio.sleep(0.05)
    response = await http.post(CHAT, json={**HI, "rid": "same"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "duplicate_rid")
    assert (await task).status_code == 200
    assert (await http.post(CHAT, json={**HI, "rid": "same"})).status_code == 200


async def test_flush_and_information(http: httpx.AsyncClient, client: FakeClient) -> None:
    assert (await http.get("/flush_cache")).text == "cache flushed: dropped 3 cached tokens\n"
    client.flush_ok = False
    response = await http.post("/flush_cache")
    assert (response.status_code, response.json()["error"]["code"]) == (400, "engine_busy")
    waiting = asyncio.create_task(http.post("/flush_cache?timeout=5"))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    client.flush_ok = True
    assert (await waiting).status_code == 200
    for query, code in (
        ("timeout=-1", "out_of_range"),
        ("timeout=x", "invalid_type"),
        ("a=1", "unknown_field"),
    ):
        response = await http.post(f"/flush_cache?{query}")
        assert (response.status_code, response.json()["error"]["code"]) == (400, code)
    assert (await http.get("/v1/models")).json()["data"][0]["max_model_len"] == 512
    assert (await http.get("/get_model_info")).json()["weight_version"] == "v7"
    assert (await http.get("/get_server_info")).json()["internal_states"][0]["pages_total"] == 64
    assert (await http.get("/")).json()["models"] == "/v1/models"


async def test_tokenize(http: httpx.AsyncClient) -> None:
    for path in ("/tokenize", "/v1/tokenize"):
        answer = (await http.post(path, json={"prompt": "hi"})).json()
        assert answer == {"tokens": [74, 75], "count": 2, "max_model_len": 512}
    answer = await http.post("/detokenize", json={"tokens": [74, 75, 2]})
    assert answer.json() == {"text": "hi"}
    answer = await http.post("/v1/detokenize", json={"tokens": [74, 75, 2], "skip_special_tokens": False})
    assert answer.json() == {"text": "hi<|im_end|>"}
    assert (await http.post("/tokenize", json={})).json()["error"]["param"] == "prompt"
    assert (await http.post("/detokenize", json={"tokens": "x"})).json()["error"]["code"] == "invalid_type"


# ---------------------------------------------------------------------- disconnects, over a real socket
@contextlib.asynccontextmanager
async def running(app: Gate) -> AsyncIterator[str]:
    port = find_free_port()
    config = uvicorn.Config(app, port=port, lifespan="off", log_config=None, access_log=False, ws="none")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    await task


async def until(condition: Any, seconds: float = 2.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(("route", "body"), GENERATING)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_disconnect_aborts(
    app: Gate, client: FakeClient, route: str, body: dict[str, Any], stream: bool, n: int
) -> None:
    client.delay = 0.05
    sampling = {"sampling_params": {"n": n}} if route == "/generate" else {"n": n}
    async with running(app) as url, httpx.AsyncClient(base_url=url) as http:
        task = asyncio.create_task(http.post(route, json={**body, **sampling, "stream": stream}))
        await until(lambda: len(client.live) == n)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: not client.live)
        assert len(client.left_early) == n
        client.delay = 0
        assert (await http.post(route, json=body)).status_code == 200


async def test_disconnect_while_reading_a_stream(app: Gate, client: FakeClient) -> None:
    client.delay = 0.02
    async with running(app) as url, httpx.AsyncClient(base_url=url) as http:
        async with http.stream("POST", CHAT, json={**HI, "stream": True}) as response:
            async for line in response.aiter_lines():
                assert line.startswith("data: ")
                break
        await until(lambda: not client.live)
    assert len(client.left_early) == 1


async def test_a_stop_string_frees_the_core_before_the_answer_ends(
    http: httpx.AsyncClient, client: FakeClient
) -> None:
    response = await http.post(CHAT, json={**HI, "stop": "END"})
    assert response.json()["choices"][0]["matched_stop"] == "END"
    assert client.left_early == [client.added[0].rid]
