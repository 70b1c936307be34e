"""Vectors, scores and reranking over a fake core: shapes, refusals, long lists."""

from __future__ import annotations

import base64
import math
import struct
from typing import Any

import httpx
import pytest

from tests.server.conftest import http_client, make_app
from tests.server.fake_client import FakeClient
from trunkline.config.schema import EngineConfig
from trunkline.engine.frontend import PART
from trunkline.engine.scoring import softmax
from trunkline.engine.vectors import unit_vector
from trunkline.text.tokenizer import Tokenizer

EMBED, ENCODE, SCORE, RERANK = "/v1/embeddings", "/encode", "/v1/score", "/v1/rerank"


async def ok(http: httpx.AsyncClient, route: str, body: dict[str, Any]) -> Any:
    response = await http.post(route, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def refused(http: httpx.AsyncClient, route: str, body: dict[str, Any]) -> tuple[str, str]:
    response = await http.post(route, json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["code"], error["param"]


def test_vectors_are_cut_first_and_have_length_1_then() -> None:
    vector = struct.pack("<3f", 3.0, 4.0, 12.0)
    assert unit_vector(vector).tolist() == pytest.approx([3 / 13, 4 / 13, 12 / 13])
    assert unit_vector(vector, 2).tolist() == pytest.approx([0.6, 0.8])
    assert unit_vector(bytes(8)).tolist() == [0.0, 0.0]


async def test_embeddings(http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer) -> None:
    client.cached = 2
    answer = await ok(http, EMBED, {"model": "tiny", "input": ["Hello", "a"], "user": "me"})
    tokens = len(tokenizer.encode("Hello")) + len(tokenizer.encode("a"))
    assert {name: answer[name] for name in ("object", "model", "usage")} == {
        "object": "list",
        "model": "tiny",
        "usage": {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }
    first, second = answer["data"]
    assert (first["object"], first["index"], second["index"]) == ("embedding", 0, 1)
    assert math.hypot(*first["embedding"]) == pytest.approx(1) and first["embedding"] != second["embedding"]
    request = client.added[0]
    assert request.pooling == "last" and request.params.max_new_tokens == 0


async def test_inputs_of_every_kind(http: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Hello")
    vectors = [
        [entry["embedding"] for entry in (await ok(http, EMBED, {"input": value}))["data"]]
        for value in ("Hello", ["Hello"], ids, [ids])
    ]
    assert all(len(found) == 1 and found == vectors[0] for found in vectors)


async def test_formats_and_dimensions(http: httpx.AsyncClient) -> None:
    def one(answer: Any) -> Any:
        return answer["data"][0]["embedding"]

    numbers = one(await ok(http, EMBED, {"input": "Hello", "encoding_format": "float"}))
    text = one(await ok(http, EMBED, {"input": "Hello", "encoding_format": "base64"}))
    assert list(struct.unpack("<4f", base64.b64decode(text))) == numbers
    short = one(await ok(http, EMBED, {"input": "Hello", "dimensions": 2}))
    assert short == pytest.approx([0.6, 0.8])
    assert await refused(http, EMBED, {"input": "Hello", "dimensions": 5}) == ("out_of_range", "dimensions")
    assert await refused(http, ENCODE, {"text": "Hello", "dimensions": 5}) == ("out_of_range", "dimensions")


async def test_bad_embedding_requests(http: httpx.AsyncClient) -> None:
    assert await refused(http, EMBED, {}) == ("missing_field", "input")
    assert await refused(http, EMBED, {"input": ""}) == ("empty_prompt", "input")
    assert await refused(http, EMBED, {"input": ["a"] * 2049}) == ("out_of_range", "input")
    assert await refused(http, EMBED, {"input": [[1], [10**6]]}) == ("token_out_of_range", "input")
    assert await refused(http, EMBED, {"input": "x " * 3000}) == ("context_length_exceeded", "input")
    assert await refused(http, "/classify", {"text": "a"}) == ("unsupported_route", "model")
    assert await refused(http, "/v1/classify", {"input": "a"}) == ("unsupported_route", "model")


async def test_encode(http: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    answer = await ok(http, ENCODE, {"text": "Hello", "rid": "mine", "return_prompt_token_ids": True})
    meta = answer["meta_info"]
    assert meta["id"] == "mine" and meta["prompt_tokens"] == len(answer["prompt_token_ids"])
    assert meta["weight_version"] == "v7" and answer["prompt_token_ids"] == tokenizer.encode("Hello")
    several = await ok(http, ENCODE, {"input_ids": [answer["prompt_token_ids"], [5]], "rid": "r"})
    assert [entry["meta_info"]["id"] for entry in several] == ["r-0", "r-1"]
    assert several[0]["embedding"] == answer["embedding"]
    assert await refused(http, ENCODE, {"text": "a", "input_ids": [1]}) == ("invalid_value", "text")
    assert await refused(http, ENCODE, {"text": ["a", "b"], "rid": ["x"]}) == ("length_mismatch", "rid")


async def test_mean_pooling_is_a_flag(client: FakeClient, tokenizer: Tokenizer, config: EngineConfig) -> None:
    from msgspec.structs import replace

    mean = replace(config, model=replace(config.model, pooling="mean"))
    async with http_client(make_app(client, tokenizer, mean)) as http:
        await ok(http, EMBED, {"input": "Hello"})
        await ok(http, ENCODE, {"text": "Hello"})
    assert [request.pooling for request in client.added] == ["mean", "mean"]


async def test_a_list_may_be_longer_than_the_queue(http: httpx.AsyncClient, client: FakeClient) -> None:
    """The queue holds 12 and 8 run: 20 at once."""
    answer = await ok(http, EMBED, {"input": [[7 + i] for i in range(50)]})
    assert [entry["index"] for entry in answer["data"]] == list(range(50))
    vectors = [tuple(entry["embedding"]) for entry in answer["data"]]
    assert len(set(vectors)) == 50 and not client.live
    error = (await http.post(EMBED, json={"input": [[1]] * 30 + [[1] * 600]})).json()["error"]
    assert error["message"].startswith("prompt 30: ")
    assert PART > 20


# ---------------------------------------------------------------------- scores
async def test_score(http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer) -> None:
    body = {"query": "Is it? ", "items": ["a", "bc"], "label_token_ids": [7, 9], "model": "tiny"}
    answer = await ok(http, SCORE, body)
    assert answer["object"] == "scoring" and answer["model"] == "tiny"
    assert answer["scores"] == [[math.exp(-9.0)] * 2] * 2  # the fake's log-probability of listed tokens
    prompts = [request.token_ids for request in client.added]
    assert prompts == [tokenizer.encode("Is it? a"), tokenizer.encode("Is it? bc")]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
    soft = await ok(http, SCORE, {**body, "apply_softmax": True, "temperature": 2.0, "items": "a"})
    assert soft["scores"] == [[0.5, 0.5]]
    await ok(http, SCORE, {**body, "query": [1, 2], "items": [[3], [4]], "item_first": True})
    assert [request.token_ids for request in client.added[-2:]] == [[3, 1, 2], [4, 1, 2]]


def test_softmax_is_of_what_the_temperature_divides() -> None:
    assert softmax([0.0, math.log(3)], 1.0) == pytest.approx([0.25, 0.75])
    assert softmax([-1000.0, -1000.0 + 2 * math.log(3)], 2.0) == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"query": None}, ("missing_field", "query")),
        ({"items": None}, ("missing_field", "items")),
        ({"label_token_ids": None}, ("missing_field", "label_token_ids")),
        ({"label_token_ids": []}, ("out_of_range", "label_token_ids")),
        ({"label_token_ids": [10**6]}, ("token_out_of_range", "label_token_ids")),
        ({"query": ["a", "b"]}, ("invalid_type", "query")),
        ({"items": [[1]]}, ("invalid_type", "items")),
        ({"temperature": 0.5}, ("invalid_value", "temperature")),
        ({"return_token_logprobs": True}, ("unsupported_field", "return_token_logprobs")),
    ],
)
async def test_bad_scores(http: httpx.AsyncClient, change: dict[str, Any], expected: tuple[str, str]) -> None:
    body = {"query": "q", "items": ["a"], "label_token_ids": [1], **change}
    assert await refused(http, SCORE, body) == expected


# ---------------------------------------------------------------------- reranking
DOCUMENTS = ["cats", "a dog", "nothing"]


def yes_no_tokenizer(backend: Any) -> Tokenizer:
    import tokenizers

    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.add_tokens(["yes", "no"])
    return Tokenizer(copy, {"eos_token": "<|im_end|>"})


async def test_rerank_asks_yes_or_no(backend: Any, client: FakeClient, config: EngineConfig) -> None:
    tokenizer = yes_no_tokenizer(backend)
    client.vocab_size = tokenizer.num_tokens
    async with http_client(make_app(client, tokenizer, config)) as http:
        results = await ok(http, RERANK, {"query": "pets", "documents": DOCUMENTS, "instruct": "Find pets"})
        short = await ok(
            http, RERANK, {"query": "q", "documents": DOCUMENTS, "top_n": 1, "return_documents": False}
        )
    assert [result["index"] for result in results] == [0, 1, 2]  # equal scores: in their order
    assert [result["document"] for result in results] == DOCUMENTS
    assert {result["score"] for result in results} == {0.5}
    assert results[0]["meta_info"]["method"] == "yes_no"
    assert len(short) == 1 and "document" not in short[0]
    prompt = tokenizer.decode(client.added[0].token_ids, skip_special_tokens=False)
    assert "<Instruct>: Find pets\n<Query>: pets\n<Document>: cats" in prompt
    labels = client.added[0].logprobs
    assert labels is not None
    assert [tokenizer.decode([token]) for token in labels.token_ids] == ["yes", "no"]


async def test_rerank_compares_vectors_without_such_tokens(
    http: httpx.AsyncClient, client: FakeClient
) -> None:
    results = await ok(http, RERANK, {"query": "a dog", "documents": DOCUMENTS})
    assert results[0]["document"] == "a dog" and results[0]["score"] == pytest.approx(1)
    assert results[0]["meta_info"]["method"] == "embedding"
    assert [result["score"] for result in results] == sorted((r["score"] for r in results), reverse=True)
    body = {"query": "q", "documents": ["a"], "instruct": "x"}
    assert await refused(http, RERANK, body) == ("unsupported_field", "instruct")
    assert await refused(http, RERANK, {"query": "q"}) == ("missing_field", "documents")
    assert await refused(http, RERANK, {"query": "q", "documents": []}) == ("out_of_range", "documents")
