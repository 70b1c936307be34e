"""/generate: request and response as in SGLang."""

from __future__ import annotations

import itertools
from typing import Any

import httpx
import pytest

from tests.server.conftest import REPLY, events_of
from tests.server.fake_client import FakeClient


async def post(http: httpx.AsyncClient, body: dict[str, Any]) -> Any:
    response = await http.post("/generate", json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_response(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.cached = 1
    answer = await post(http, {"text": "hi", "rid": "me"})
    meta = answer["meta_info"]
    assert answer["text"] == REPLY and len(answer["output_ids"]) == 23
    assert meta.pop("e2e_latency") > 0
    assert meta == {
        "id": "me",
        "finish_reason": {"type": "stop", "matched": 2},
        "prompt_tokens": 2,
        "completion_tokens": 23,
        "cached_tokens": 1,
        "weight_version": "v7",
        "num_retractions": 0,
    }
    assert set(answer) == {"text", "output_ids", "meta_info"}


async def test_finish_reasons(http: httpx.AsyncClient) -> None:
    cut = await post(http, {"text": "hi", "sampling_params": {"max_new_tokens": 3}})
    assert cut["meta_info"]["finish_reason"] == {"type": "length", "length": 3}
    stopped = await post(http, {"text": "hi", "sampling_params": {"stop": "wörld"}})
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": "wörld"}
    assert stopped["text"] == "Hello, "


async def test_lists(http: httpx.AsyncClient, client: FakeClient) -> None:
    answers = await post(http, {"text": ["hi"], "sampling_params": [{"max_new_tokens": 2}]})
    assert [answer["text"] for answer in answers] == ["Hello,"]
    answers = await post(
        http,
        {
            "input_ids": [[74], [75]],
            "sampling_params": {"n": 2, "max_new_tokens": 1},
            "rid": ["a", "b"],
            "return_logprob": [True, False],
            "top_logprobs_num": [1, None],
            "return_prompt_token_ids": True,
        },
    )
    assert [answer["meta_info"]["id"] for answer in answers] == ["a", "a", "b", "b"]
    assert [answer["prompt_token_ids"] for answer in answers] == [[74], [74], [75], [75]]
    assert ["output_token_logprobs" in answer["meta_info"] for answer in answers] == [True] * 2 + [False] * 2
    assert "output_top_logprobs" in answers[0]["meta_info"]


async def test_logprobs(http: httpx.AsyncClient) -> None:
    body = {
        "text": "hi",
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
        "token_ids_logprob": [5, 6],
        "sampling_params": {"max_new_tokens": 1},
    }
    answer = await post(http, body)
    (token,), meta = answer["output_ids"], answer["meta_info"]
    assert meta["input_token_logprobs"] == [[None, 74, None], [-0.5, 75, None]]
    assert meta["output_token_logprobs"] == [[-0.5, token, None]]
    assert meta["output_token_logprobs_length"] == 1
    assert meta["input_top_logprobs"] == [None, [[-0.5, 75, None], [-1.5, 76, None]]]
    assert meta["output_token_ids_logprobs"] == [[[-9.0, 5, None], [-9.0, 6, None]]]
    meta = (await post(http, {**body, "return_text_in_logprobs": True, "logprob_start_len": -1}))["meta_info"]
    assert meta["output_token_logprobs"] == [[-0.5, token, "Hello"]]
    assert meta["input_token_logprobs"] == []


BODIES: list[dict[str, Any]] = [
    {"text": "hi"},
    {"text": ["hi", "h"]},
    {"text": "hi", "sampling_params": {"n": 3, "stop": ["END"]}},
    {"text": "hi", "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 1},
    {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 0}},
]


@pytest.mark.parametrize("size", [1, 3, 50])
@pytest.mark.parametrize("body", BODIES)
async def test_the_last_events_of_a_stream_are_the_response(
    http: httpx.AsyncClient, client: FakeClient, body: dict[str, Any], size: int
) -> None:
    client.tokens_per_message = size
    events = events_of((await http.post("/generate", json={**body, "stream": True})).text)
    last = {event.pop("index", 0): event for event in events}
    whole = await post(http, body)
    whole = whole if isinstance(whole, list) else [whole]
    assert len(last) == len(whole)
    for index, answer in enumerate(whole):
        for one in (answer, last[index]):
            one["meta_info"] |= {"id": "", "e2e_latency": 0}
        assert last[index] == answer
    texts = [event["text"] for event in events]
    assert len(whole) > 1 or all(b.startswith(a) for a, b in itertools.pairwise(texts))


async def test_the_output_limit(http: httpx.AsyncClient, client: FakeClient) -> None:
    for prompt, sampling, limit in [
        ([5], {}, 128),
        ([5], {"max_new_tokens": None}, 511),
        ([5], {"max_new_tokens": 7}, 7),
        ([5] * 500, {}, 12),
    ]:
        await post(http, {"input_ids": prompt, "sampling_params": sampling})
        assert client.added[-1].params.max_new_tokens == limit


async def test_the_salt_separates_caches(http: httpx.AsyncClient, client: FakeClient) -> None:
    for fields in ({}, {"cache_salt": "x"}, {"extra_key": "x"}, {"extra_key": "x", "cache_salt": "y"}):
        await post(http, {"text": "hi", **fields})
    salts = [add.cache_key.salt for add in client.added]
    assert salts[0] == "" and len(set(salts)) == 4


async def test_an_error_names_the_prompt(http: httpx.AsyncClient, client: FakeClient) -> None:
    response = await http.post("/generate", json={"text": ["a", "b " * 600]})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("prompt 1: the prompt has ")
    assert not client.added


# ---------------------------------------------------------------------- how often a stream is told
@pytest.mark.parametrize("logprobs", [False, True])
async def test_an_interval_changes_the_pieces_only(
    logprobs: bool, http: httpx.AsyncClient, client: FakeClient
) -> None:
    client.forced = [0]
    body: dict[str, Any] = {"text": "a", "return_logprob": logprobs, "stream": True}
    every = events_of((await http.post("/generate", json=body)).text)
    body["sampling_params"] = {"stream_interval": 5}
    fifth = events_of((await http.post("/generate", json=body)).text)
    sizes = [len(event["output_ids"]) for event in fifth]
    assert sizes[:4] == [1, 6, 11, 16] and sizes[-1] == len(every[-1]["output_ids"]) == 23

    def last(events: list[dict[str, Any]]) -> dict[str, Any]:
        meta = events[-1]["meta_info"]
        return {**events[-1], "meta_info": {**meta, "id": "", "e2e_latency": 0}}

    assert last(fifth) == last(every)


def test_an_interval_keeps_reasoning_and_text_apart() -> None:
    from trunkline.engine.frontend import Chunk, _joined

    def piece(text: str, reasoning: str, ids: list[int], **more: Any) -> Chunk:
        return Chunk(
            index=0, rid="a", text=text, reasoning=reasoning, token_ids=ids, logprobs=None,
            prompt_logprobs=None, prompt_tokens=1, completion_tokens=0, cached_tokens=0,
            retractions=0, finish=None, **more,
        )  # fmt: skip

    joined = _joined(piece("", "so ", [1, 2], forced=[1]), piece("then", "it is", [3, 4], forced=[0]))
    assert (joined.reasoning, joined.text) == ("so it is", "then")
    assert (joined.token_ids, list(joined.forced), joined.logprobs) == ([1, 2, 3, 4], [1, 2], None)
