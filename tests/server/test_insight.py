"""Parameters asked back, prefix-miss reports and loads, over HTTP and through `Engine`."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.server.conftest import events_of, http_client, make_app
from tests.server.fake_client import FakeClient
from trunkline.config.schema import EngineConfig
from trunkline.engine.offline import Engine
from trunkline.text.tokenizer import Tokenizer
from trunkline.types import RequestError

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


async def ask(http: httpx.AsyncClient, rid: str) -> dict:
    response = await http.get(f"/effective_parameters/{rid}")
    assert response.status_code == 200, response.text
    return response.json()


async def begun(client: FakeClient) -> None:
    """Wait until a request has reached the core."""
    async with asyncio.timeout(10):
        while not client.live:
            await asyncio.sleep(0.005)


async def test_each_value_with_its_source(
    client: FakeClient, tokenizer: Tokenizer, config: EngineConfig
) -> None:
    app = make_app(client, tokenizer, config, temperature=0.6, top_k=20)
    async with http_client(app) as http:
        sent = {**CHAT, "rid": "a", "top_p": 0.9, "max_tokens": 7, "stop": ["END"], "n": 2}
        await http.post("/v1/chat/completions", json=sent)
        report = await ask(http, "a")
    assert (report["state"], report["route"], report["weight_version"]) == ("finished", CHAT_ROUTE, "v7")
    (prompt,) = report["prompts"]
    parameters = prompt["parameters"]
    assert parameters["top_p"] == {"value": 0.9, "source": "request", "field": "top_p"}
    assert parameters["max_new_tokens"] == {"value": 7, "source": "request", "field": "max_tokens"}
    assert parameters["stop"] == {"value": ["END"], "source": "request", "field": "stop"}
    assert parameters["temperature"] == {"value": 0.6, "source": "model", "why": "generation_config.json"}
    assert parameters["top_k"]["source"] == "model"
    assert parameters["min_p"] == {"value": 0.0, "source": "interface"}
    assert parameters["sampling_seed"]["source"] == "server"
    assert parameters["sampling_seed"]["value"] == client.added[0].params.sampling_seed
    assert len(prompt["completions"]) == 2
    assert prompt["completions"][0]["finish_reason"] == {"type": "length", "length": 7}


CHAT_ROUTE = "/v1/chat/completions"


async def test_limits_that_the_context_sets(http: httpx.AsyncClient) -> None:
    await http.post(CHAT_ROUTE, json={**CHAT, "rid": "a"})
    limit = (await ask(http, "a"))["prompts"][0]["parameters"]["max_new_tokens"]
    assert limit["source"] == "server" and "the context of 512 tokens leaves" in limit["why"]
    await http.post("/generate", json={"input_ids": [5] * 450, "rid": "b"})
    limit = (await ask(http, "b"))["prompts"][0]["parameters"]["max_new_tokens"]
    assert limit["value"] < 128 and limit["why"].startswith("128 was the default;")


async def test_parameters_of_each_prompt_of_a_list(http: httpx.AsyncClient) -> None:
    params = [{"temperature": 0.5}, {"top_k": 3}]
    await http.post("/generate", json={"text": ["a", "b"], "rid": ["x", "y"], "sampling_params": params})
    first = (await ask(http, "x"))["prompts"][0]["parameters"]
    second = (await ask(http, "y"))["prompts"][0]["parameters"]
    assert first["temperature"]["field"] == "sampling_params.temperature"
    assert first["top_k"]["source"] == second["temperature"]["source"] == "interface"
    assert second["top_k"] == {"value": 3, "source": "request", "field": "sampling_params.top_k"}


async def test_live_requests_and_those_that_failed(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.delay = 0.02
    task = asyncio.create_task(http.post("/v1/completions", json={"prompt": "hi", "rid": "live"}))
    await begun(client)
    assert (await ask(http, "live"))["state"] == "running"
    await http.post("/abort_request", json={"rid": "live"})
    await task
    assert (await ask(http, "live"))["prompts"][0]["completions"][0]["finish_reason"]["type"] == "abort"
    client.dies_after, client.delay = 1, 0
    await http.post("/v1/completions", json={"prompt": "hi", "rid": "dead"})
    assert (await ask(http, "dead"))["state"] == "failed"


async def test_the_header_names_a_request_too(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/completions", json={"prompt": "hi"})
    report = await ask(http, response.headers["x-request-id"])
    assert report["prompts"][0]["rid"] == response.json()["id"]


async def test_unknown_ids(http: httpx.AsyncClient) -> None:
    response = await http.get("/effective_parameters/nope")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_rid")


async def test_ids_of_running_requests_stay_with_them(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.delay = 0.02
    body = {"prompt": "hi", "rid": "same", "temperature": 0.25}
    task = asyncio.create_task(http.post("/v1/completions", json=body))
    await begun(client)
    refused = await http.post("/v1/completions", json={"prompt": "hi", "rid": "same"})
    assert refused.json()["error"]["code"] == "duplicate_rid"
    assert (await ask(http, "same"))["prompts"][0]["parameters"]["temperature"]["value"] == 0.25
    await task


# ---------------------------------------------------------------------- loads
async def test_loads(http: httpx.AsyncClient) -> None:
    answer = (await http.get("/v1/loads")).json()
    (load,) = answer["loads"]
    assert (load["num_used_tokens"], load["token_usage"], load["max_running_requests"]) == (128, 0.25, 8)
    assert load["memory"]["token_capacity"] == 4096 and load["queues"]["waiting"] == 0
    only = (await http.get("/v1/loads?include=queues")).json()["loads"][0]
    assert set(only) == {"dp_rank", "queues"}
    absent = {"speculative": None, "lora": None, "disaggregation": None}  # as of a server without them
    asked = (await http.get("/v1/loads?include=queues,disagg,spec,lora")).json()["loads"][0]
    assert asked == only | absent and absent.items() <= load.items()
    text = (await http.get("/v1/loads?format=prometheus")).text
    assert 'trunkline:token_usage{model_name="tiny"} 0.25' in text and "http_requests" not in text
    for query, code in (
        ("include=core,loras", "invalid_value"),
        ("format=xml", "invalid_value"),
        ("dp_rank=1", "out_of_range"),
    ):
        response = await http.get(f"/v1/loads?{query}")
        assert (response.status_code, response.json()["error"]["code"]) == (400, code)


# ---------------------------------------------------------------------- an engine
@pytest.fixture(scope="module")
def engine():  # type: ignore[no-untyped-def]
    with Engine(
        page_size=4, max_total_tokens=2048, context_length=256, device="cpu", cpu_threads=1
    ) as engine:
        yield engine


def test_the_engine_tells_where_a_prompt_left_the_tree(engine: Engine) -> None:
    base = "The days of the week are Monday, Tuesday, Wednesday, Thursday"
    greedy = {"temperature": 0, "max_new_tokens": 2}
    first = engine.generate(base + " and Friday.", greedy, return_prefix_miss=True)
    assert isinstance(first, dict)
    assert first["meta_info"]["prefix_miss"]["reason"] == "empty"
    plain = engine.generate(base, greedy)
    assert isinstance(plain, dict) and "prefix_miss" not in plain["meta_info"]
    second = engine.generate(base + " or Sunday.", greedy, return_prefix_miss=True)
    assert isinstance(second, dict)
    report = second["meta_info"]["prefix_miss"]
    assert report["reason"] == "other_tokens"
    assert report["matched_tokens"] == second["meta_info"]["cached_tokens"] > 0
    assert report["prompt"]["text"].startswith(" or") and report["cache"]["text"].startswith(" and")
    assert "' or" in report["explanation"] and "' and" in report["explanation"]
    assert report["position"] >= report["matched_tokens"]
    salted = engine.generate(base + " or Sunday.", greedy, return_prefix_miss=True, cache_salt="me")
    assert isinstance(salted, dict)
    others = salted["meta_info"]["prefix_miss"]["other_namespaces"]
    assert others[0]["salted"] is False and others[0]["matched"] > 0


def test_the_engine_is_asked_back(engine: Engine) -> None:
    answer = engine.generate("hi", {"max_new_tokens": 2, "top_k": 4})
    assert isinstance(answer, dict)
    parameters = engine.effective_parameters(answer["meta_info"]["id"])["prompts"][0]["parameters"]
    assert parameters["top_k"] == {"value": 4, "source": "request", "field": "sampling_params.top_k"}
    with pytest.raises(RequestError) as caught:
        engine.effective_parameters("nope")
    assert caught.value.code == "unknown_rid"


async def test_chat_usage_carries_the_report(http: httpx.AsyncClient, client: FakeClient) -> None:
    body = {**CHAT, "return_prefix_miss": True, "stream": True, "stream_options": {"include_usage": True}}
    events = events_of((await http.post(CHAT_ROUTE, json=body)).text)
    assert client.added[-1].explain_prefix == "counts"
    assert events[-1]["usage"]["prompt_tokens_details"]["prefix_miss"]["reason"] == "empty"
    await http.post(CHAT_ROUTE, json={**body, "cache_salt": "me"})
    assert client.added[-1].explain_prefix == "tokens"
    await http.post(CHAT_ROUTE, json=CHAT)
    assert client.added[-1].explain_prefix == "no"
