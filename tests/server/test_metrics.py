"""Counters equal the sums over responses (P20)."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.fake_client import FakeClient
from trunkline.engine.frontend import Chunk
from trunkline.engine.usage import Usage
from trunkline.metrics.prometheus import Metrics


def samples(text: str) -> dict[str, float]:
    """Sums over labels, by sample name."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith(("_bucket", "_created")):
                sums[sample.name] = sums.get(sample.name, 0) + sample.value
    return sums


async def test_counters_are_sums_over_responses(http: httpx.AsyncClient, client: FakeClient) -> None:
    rng = random.Random(5)
    client.cached = 1
    bodies: list[tuple[str, dict[str, Any]]] = []
    for _ in range(25):
        text = "hi " * rng.randrange(1, 9)
        n, limit, stop = rng.randrange(1, 4), rng.randrange(1, 30), rng.choice([[], ["END"], ["o"]])
        bodies.append(("/v1/completions", {"prompt": [text, "a"], "n": n, "max_tokens": limit, "stop": stop}))
        message = {"role": "user", "content": text}
        bodies.append(("/v1/chat/completions", {"messages": [message], "n": n, "max_tokens": limit}))
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "cached": 0}
    completions = 0
    for route, body in bodies:
        answer = (await http.post(route, json=body)).json()
        completions += len(answer["choices"])
        usage["prompt_tokens"] += answer["usage"]["prompt_tokens"]
        usage["completion_tokens"] += answer["usage"]["completion_tokens"]
        usage["cached"] += answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    await http.post("/v1/completions", json={"prompt": "x", "temperature": -1})
    seen = samples((await http.get("/metrics")).text)
    assert seen["trunkline:prompt_tokens_total"] == usage["prompt_tokens"]
    assert seen["trunkline:generation_tokens_total"] == usage["completion_tokens"]
    assert seen["trunkline:cached_tokens_total"] == usage["cached"] > 0
    assert seen["trunkline:num_requests_total"] == completions
    assert seen["trunkline:e2e_request_latency_seconds_count"] == completions
    assert seen["trunkline:time_to_first_token_seconds_count"] == completions
    between = usage["completion_tokens"] - completions
    assert seen["trunkline:inter_token_latency_seconds_count"] == between
    assert seen["trunkline:num_aborted_requests_total"] == 0
    assert seen["trunkline:http_requests_total"] == len(bodies) + 1


async def test_aborted_completions_count(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.delay, client.cached = 0.02, 1
    body = {"prompt": "hi", "rid": "r", "n": 2}
    task = asyncio.create_task(http.post("/v1/completions", json=body))
    await asyncio.sleep(0.05)
    await http.post("/abort_request", json={"rid": "r"})
    usage = (await task).json()["usage"]
    seen = samples((await http.get("/metrics")).text)
    assert seen["trunkline:num_aborted_requests_total"] == 2
    assert seen["trunkline:num_requests_total"] == 2
    assert seen["trunkline:cached_tokens_total"] == 1
    assert seen["trunkline:generation_tokens_total"] == usage["completion_tokens"] > 0


def test_usage_counts_a_prompt_once() -> None:
    usage = Usage(2)
    for index, cached in [(0, 0), (1, 8), (0, 0), (3, 8), (2, 4)]:
        chunk = Chunk(
            index=index, rid="r", text="", token_ids=[1], logprobs=None, prompt_logprobs=None,
            prompt_tokens=9, completion_tokens=1, cached_tokens=cached, retractions=0, finish=None,
        )  # fmt: skip
        usage.add(chunk)
    assert (usage.prompt_tokens, usage.completion_tokens) == (18, 5)
    assert usage.cached_tokens == 4  # what others of the same prompt found is its own first one's work


async def test_nothing_exported_stays_empty(http: httpx.AsyncClient) -> None:
    await http.post("/v1/completions", json={"prompt": "hi"})
    seen = samples((await http.get("/metrics")).text)
    assert seen["trunkline:num_running_reqs"] == 0
    assert seen["trunkline:token_usage"] == 0.25
    assert seen["trunkline:num_used_tokens"] == 128
    assert seen["trunkline:max_total_num_tokens"] == 512
    assert seen["trunkline:cache_hit_rate"] == 0.25
    assert seen["trunkline:http_requests_active"] == 1


async def test_clients_cannot_make_series(http: httpx.AsyncClient) -> None:
    for i in range(5):
        await http.request(f"X{i}", f"/nope/{i}")
    text = (await http.get("/metrics")).text
    assert text.count('route="unknown"') == 2  # one series, and when it was made
    assert "/nope" not in text


def test_registries_are_apart() -> None:
    one, other = Metrics("a"), Metrics("b")
    one.http_started()
    assert "http_requests_active 1.0" in one.exposition(None).decode()
    assert "http_requests_active 0.0" in other.exposition(None).decode()
    with pytest.raises(KeyError):
        one._stages["nope"]
