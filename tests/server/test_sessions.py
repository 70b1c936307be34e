"""Sessions: what a request goes on from, over HTTP with a fake core and from `Engine` with a real one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

import trunkline
from tests.server.conftest import http_client, make_app
from tests.server.fake_client import FakeClient
from trunkline.config.schema import EngineConfig
from trunkline.engine.sessions import SessionRef, Sessions
from trunkline.text.tokenizer import Tokenizer
from trunkline.types import RequestError

TWO = {"max_new_tokens": 2}


async def opened(http: httpx.AsyncClient, **fields: Any) -> str:
    response = await http.post("/open_session", json=fields)
    assert response.status_code == 200, response.text
    return str(response.json())


async def generated(http: httpx.AsyncClient, ids: list[int], session: Any, **more: Any) -> dict[str, Any]:
    where = {"session_id": session} if isinstance(session, str) else {"session_params": session}
    body = {"input_ids": ids, "sampling_params": TWO, **where, **more}
    response = await http.post("/generate", json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


async def refused(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> tuple[int, str, str | None]:
    response = await http.post(path, json=body)
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


@pytest.fixture
def client(tokenizer: Tokenizer) -> FakeClient:
    """Each output says how long its prompt was."""
    return FakeClient(
        lambda add: [len(add.token_ids), 100 + len(add.token_ids)], eos=2, vocab_size=tokenizer.num_tokens
    )


async def test_a_request_goes_on_from_another_ones_prompt_and_output(
    http: httpx.AsyncClient, client: FakeClient
) -> None:
    session = await opened(http, capacity_of_str_len=1000, session_id="talk")
    assert session == "talk"
    first = await generated(http, [10, 11, 12], {"id": "talk"}, rid="one")
    assert first["output_ids"] == [3, 103]
    await generated(http, [13], {"id": "talk", "rid": "one"}, rid="two")
    assert client.added[-1].token_ids == [10, 11, 12, 3, 103, 13]
    await generated(http, [14], {"id": "talk", "rid": "two"})  # O(new): the third sends one token
    assert client.added[-1].token_ids == [10, 11, 12, 3, 103, 13, 6, 106, 14]
    await generated(http, [15], {"id": "talk", "rid": "one"})  # a branch
    assert client.added[-1].token_ids == [10, 11, 12, 3, 103, 15]
    await generated(http, [16], {"id": "talk"})  # a new beginning
    assert client.added[-1].token_ids == [16]
    await generated(http, [17], "talk", return_prompt_token_ids=True)  # the latest
    assert client.added[-1].token_ids == [16, 1, 101, 17]
    turns = [add.turn for add in client.added]
    assert [(turn.number, turn.follows, turn.kept) for turn in turns if turn] == [
        (1, 0, 0), (2, 1, 5), (3, 2, 8), (4, 1, 5), (5, 0, 0), (6, 5, 3),
    ]  # fmt: skip
    (session,) = {turn.session for turn in turns if turn}
    assert client.ended_sessions == []
    assert (await http.post("/close_session", json={"session_id": "talk"})).status_code == 200
    await asyncio.sleep(0)
    assert client.ended_sessions == [session]


async def test_offset_and_drop_previous_output_cut_what_is_continued(
    http: httpx.AsyncClient, client: FakeClient
) -> None:
    await opened(http, session_id="s")
    await generated(http, [10, 11, 12], {"id": "s"}, rid="one")
    for params, before in (
        ({"offset": -1}, [10, 11, 12, 3]),
        ({"offset": 2}, [10, 11]),
        ({"offset": 0}, [10, 11, 12, 3, 103]),
        ({"drop_previous_output": True}, [10, 11, 12]),
        ({"drop_previous_output": True, "offset": -2}, [10]),
    ):
        rid = f"cut {params}"
        await generated(http, [20], {"id": "s", "rid": "one", **params}, rid=rid)
        assert client.added[-1].token_ids == [*before, 20]
        await generated(http, [21], {"id": "s", "rid": rid})  # what was cut stays cut
        assert client.added[-1].token_ids[: len(before) + 1] == [*before, 20]
    body = {"input_ids": [1], "session_params": {"id": "s", "rid": "one", "offset": 6}}
    assert await refused(http, "/generate", body) == (400, "out_of_range", "session_params.offset")


async def test_text_goes_on_without_special_tokens_and_may_be_empty(
    http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer
) -> None:
    await opened(http, session_id="s")
    body = {"text": "Hello", "sampling_params": TWO, "rid": "one", "session_params": {"id": "s"}}
    assert (await http.post("/generate", json=body)).status_code == 200
    first = client.added[-1].token_ids
    body = {"text": ", world", "sampling_params": TWO, "session_id": "s"}
    assert (await http.post("/generate", json=body)).status_code == 200
    output = [len(first), 100 + len(first)]
    assert client.added[-1].token_ids == [
        *first,
        *output,
        *tokenizer.encode(", world", add_special_tokens=False),
    ]
    body = {"text": "", "sampling_params": TWO, "session_params": {"id": "s", "rid": "one"}}
    assert (await http.post("/generate", json=body)).status_code == 200
    assert client.added[-1].token_ids == [*first, *output]
    await opened(http, session_id="empty")
    body = {"text": "", "session_params": {"id": "empty"}}
    assert await refused(http, "/generate", body) == (400, "empty_prompt", "text")


async def test_replace_forgets_what_followed(http: httpx.AsyncClient, client: FakeClient) -> None:
    await opened(http, session_id="s")
    await generated(http, [10], {"id": "s"}, rid="a")
    await generated(http, [11], {"id": "s", "rid": "a"}, rid="b")
    await generated(http, [12], {"id": "s", "rid": "b"}, rid="c")
    await generated(http, [13], {"id": "s", "rid": "a", "replace": True}, rid="d")
    assert client.added[-1].token_ids == [10, 1, 101, 13]
    for gone in ("b", "c"):
        body = {"input_ids": [1], "session_params": {"id": "s", "rid": gone}}
        assert await refused(http, "/generate", body) == (400, "unknown_session_rid", "session_params.rid")
    await generated(http, [14], {"id": "s", "replace": True}, rid="a")  # all of it: even its name is free
    body = {"input_ids": [1], "session_params": {"id": "s", "rid": "d"}}
    assert (await refused(http, "/generate", body))[1] == "unknown_session_rid"
    await generated(http, [15], "s")
    assert client.added[-1].token_ids == [14, 1, 101, 15]


async def test_replace_ends_a_running_request(http: httpx.AsyncClient, client: FakeClient) -> None:
    await opened(http, session_id="s")
    client.delay = 0.2
    running = asyncio.create_task(generated(http, [10], {"id": "s"}, rid="a"))
    while not client.live:
        await asyncio.sleep(0.005)
    body = {"input_ids": [1], "session_params": {"id": "s", "rid": "a"}}
    assert await refused(http, "/generate", body) == (409, "session_busy", "session_params.rid")
    await generated(http, [11], {"id": "s", "rid": "a", "replace": True})
    assert (await running)["meta_info"]["finish_reason"]["type"] == "abort"
    assert client.added[-1].token_ids == [10, 11]


async def test_several_completions_and_lists_are_branches(
    http: httpx.AsyncClient, client: FakeClient
) -> None:
    await opened(http, session_id="s")
    params = {"max_new_tokens": 2, "n": 2}
    body = {"input_ids": [10], "rid": "r", "sampling_params": params, "session_params": {"id": "s"}}
    assert (await http.post("/generate", json=body)).status_code == 200
    body = {
        "input_ids": [[20], [21], [22]],
        "sampling_params": TWO,
        "session_params": [{"id": "s", "rid": "r-0"}, {"id": "s", "rid": "r-1", "offset": 1}, None],
    }
    assert (await http.post("/generate", json=body)).status_code == 200
    assert [add.token_ids for add in client.added[-3:]] == [[10, 1, 101, 20], [10, 21], [22]]
    assert [add.turn is not None for add in client.added[-3:]] == [True, True, False]


async def test_streaming_sessions_are_only_appended_to(http: httpx.AsyncClient, client: FakeClient) -> None:
    await opened(http, session_id="s", streaming=True)
    for ids in ([10], [11], [12]):
        await generated(http, ids, {"id": "s"}, rid=f"r{ids[0]}")
    assert client.added[-1].token_ids == [10, 1, 101, 11, 4, 104, 12]
    for params in ({"replace": True}, {"offset": 1}, {"drop_previous_output": True}):
        body = {"input_ids": [1], "session_params": {"id": "s", **params}}
        assert await refused(http, "/generate", body) == (400, "invalid_value", "session_params")
    body = {"input_ids": [1], "session_params": {"id": "s", "rid": "r10"}}
    assert (await refused(http, "/generate", body))[1] == "unknown_session_rid"
    await generated(http, [13], {"id": "s", "rid": "r12"})
    both = {"input_ids": [[1], [2]], "session_params": {"id": "s"}}
    status, code, _ = await refused(http, "/generate", both)
    assert (status, code) == (409, "session_busy")
    await generated(http, [14], {"id": "s"})  # what was refused left nothing behind
    assert client.added[-1].token_ids[-4:] == [13, 10, 110, 14]


async def test_requests_that_fail_or_whose_client_leaves_are_not_remembered(
    http: httpx.AsyncClient, client: FakeClient
) -> None:
    await opened(http, session_id="s")
    client.delay = 0.05
    task = asyncio.create_task(generated(http, [10], {"id": "s"}, rid="a"))
    while not client.live:
        await asyncio.sleep(0.005)
    task.cancel()
    while client.live:
        await asyncio.sleep(0.005)
    client.delay = 0.0
    body = {"input_ids": [1], "session_params": {"id": "s", "rid": "a"}}
    assert (await refused(http, "/generate", body))[1] == "unknown_session_rid"
    await generated(http, [10], {"id": "s"}, rid="a")  # its id may be used again
    body = {"input_ids": [10], "rid": "a", "session_params": {"id": "s"}}
    assert await refused(http, "/generate", body) == (400, "duplicate_rid", "rid")


async def test_another_cache_salt_sees_no_session(http: httpx.AsyncClient) -> None:
    await opened(http, session_id="s")
    await generated(http, [10], {"id": "s"}, rid="a", cache_salt="mine")
    for salt in ({}, {"cache_salt": "yours"}, {"extra_key": "mine"}):
        body = {"input_ids": [1], "session_params": {"id": "s", "rid": "a"}, **salt}
        assert await refused(http, "/generate", body) == (404, "unknown_session", "session_params.id")
    await generated(http, [11], {"id": "s", "rid": "a"}, cache_salt="mine")


async def test_bad_sessions_are_refused_by_name(http: httpx.AsyncClient) -> None:
    await opened(http, session_id="s")
    assert await refused(http, "/open_session", {"session_id": "s"}) == (400, "session_exists", "session_id")
    assert await refused(http, "/open_session", {"sesion": "s"}) == (400, "unknown_field", "sesion")
    assert await refused(http, "/open_session", {"timeout": 0}) == (400, "out_of_range", "timeout")
    assert await refused(http, "/close_session", {"session_id": "x"}) == (
        404,
        "unknown_session",
        "session_id",
    )
    assert await refused(http, "/close_session", {}) == (400, "missing_field", "session_id")
    for session, expected in (
        ({"session_params": {"id": "x"}}, (404, "unknown_session", "session_params.id")),
        ({"session_id": "x"}, (404, "unknown_session", "session_id")),
        ({"session_params": {"rid": "x"}}, (400, "missing_field", "session_params.id")),
        ({"session_params": {"id": "s", "ofset": 1}}, (400, "unknown_field", "session_params.ofset")),
        ({"session_params": {"id": "s"}, "session_id": "s"}, (400, "invalid_value", "session_id")),
    ):
        assert await refused(http, "/generate", {"input_ids": [1], **session}) == expected


def with_sessions(
    client: FakeClient, tokenizer: Tokenizer, config: EngineConfig, **server: Any
) -> httpx.AsyncClient:
    changed = msgspec.structs.replace(config.server, **server)
    return http_client(make_app(client, tokenizer, msgspec.structs.replace(config, server=changed)))


async def test_several_api_processes_refuse_sessions_by_name(
    client: FakeClient, tokenizer: Tokenizer, config: EngineConfig
) -> None:
    server = msgspec.structs.replace(config.server, processes=2)
    app = make_app(client, tokenizer, msgspec.structs.replace(config, server=server))
    async with http_client(app) as http:
        for where, param in (
            ({"session_params": {"id": "x"}}, "session_params.id"),
            ({"session_id": "x"}, "session_id"),
        ):
            answer = await refused(http, "/generate", {"input_ids": [1], **where})
            assert answer == (501, "needs_one_process", param)
    assert not client.added


async def test_number_and_size_are_bounded(
    client: FakeClient, tokenizer: Tokenizer, config: EngineConfig
) -> None:
    async with with_sessions(client, tokenizer, config, max_sessions=2, max_session_tokens=13) as http:
        await opened(http, session_id="small", capacity_of_str_len=5)
        await opened(http, session_id="s")
        assert (await refused(http, "/open_session", {}))[:2] == (429, "too_many_sessions")
        await generated(http, [10, 11, 12], {"id": "small"})
        body = {"input_ids": [1], "session_params": {"id": "small"}}
        assert await refused(http, "/generate", body) == (400, "session_full", "session_params")
        await generated(http, [10] * 6, {"id": "s"})  # 5 + 8 tokens
        assert (await refused(http, "/generate", {"input_ids": [1], "session_id": "s"}))[1] == "session_full"
        await http.post("/close_session", json={"session_id": "small"})
        await generated(http, [1], "s")  # there is room again


async def test_an_unused_session_is_closed_and_a_used_one_is_not(
    client: FakeClient, tokenizer: Tokenizer, config: EngineConfig
) -> None:
    async with with_sessions(client, tokenizer, config, max_sessions=1, session_timeout=0.3) as http:
        await opened(http, session_id="s")
        client.delay = 0.2
        await generated(http, [1, 2, 3], {"id": "s"})  # takes longer than the timeout
        assert client.ended_sessions == []
        client.delay = 0.0
        await generated(http, [1], "s")
        while not client.ended_sessions:
            await asyncio.sleep(0.01)
        assert (await refused(http, "/generate", {"input_ids": [1], "session_id": "s"}))[0] == 404
        await opened(http, timeout=1000)  # its place is free; the server's own limit holds
        while len(client.ended_sessions) < 2:
            await asyncio.sleep(0.01)


def test_a_change_between_check_and_start_is_noticed() -> None:
    async def check() -> None:
        sessions = Sessions(4, 1000, 60.0, lambda key: None)
        sessions.open(session_id="s")
        one = sessions.find(SessionRef(id="s"), "")
        one.begin(["a"], [1], "")
        one.extend(0, [2], True)
        one.end()
        turn = sessions.find(SessionRef(id="s", rid="a"), "")
        anew = sessions.find(SessionRef(id="s", replace=True), "")
        anew.begin(["b"], [3], "")
        with pytest.raises(RequestError) as caught:
            turn.begin(["c"], [4], "")
        assert caught.value.code == "unknown_session_rid"
        anew.end()
        assert sessions.num_tokens == 0
        late = sessions.find(SessionRef(id="s"), "")
        sessions.close("s")
        with pytest.raises(RequestError) as caught:
            late.begin(["d"], [5], "")
        assert caught.value.code == "unknown_session"
        assert sessions.num_open == 0

    asyncio.run(check())


# ---------------------------------------------------------------------- a real core
@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[trunkline.Engine]:
    with trunkline.Engine(
        model_path=str(tiny_model), max_total_tokens=2048, context_length=1024, cpu_threads=1, page_size=4
    ) as engine:
        yield engine


def test_a_conversation_sends_what_is_new_and_gets_what_whole_prompts_get(engine: trunkline.Engine) -> None:
    greedy = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    session = engine.open_session()
    whole: list[int] = []
    sent = 0
    for turn in range(32):
        new = [5 + turn, 6, 7, 8 + turn]
        answer = engine.generate(input_ids=new, sampling_params=greedy, session_id=session)
        assert isinstance(answer, dict)
        whole += new
        sent += len(json.dumps(new))
        expected = engine.generate(input_ids=whole, sampling_params=greedy)
        assert isinstance(expected, dict) and answer["output_ids"] == expected["output_ids"]
        meta = answer["meta_info"]
        assert meta["prompt_tokens"] == len(whole)
        assert meta["cached_tokens"] >= len(whole) - len(new) - 4  # but for a page that was not full
        whole += answer["output_ids"]
    assert sent < 32 * 24
    engine.close_session(session)
    with pytest.raises(RequestError) as caught:
        engine.generate(input_ids=[1], session_id=session)
    assert caught.value.code == "unknown_session"


def test_a_session_outlives_a_flood_of_others_prompts(engine: trunkline.Engine) -> None:
    """Its pages are evicted last, and those of a session that ended like any others."""
    one = {"temperature": 0, "max_new_tokens": 1}
    prompt = [9] * 200
    for session in (engine.open_session(), None):
        engine.flush_cache()
        engine.generate(input_ids=prompt, sampling_params=one, session_id=session)
        for first in range(20, 34):
            engine.generate(input_ids=[first] * 200, sampling_params=one)
        answer = engine.generate(input_ids=[*prompt, 10], sampling_params=one)
        assert isinstance(answer, dict)
        assert (answer["meta_info"]["cached_tokens"] >= 196) == (session is not None)
        if session is not None:
            engine.close_session(session)
    state = engine.get_server_info()["internal_states"][0]
    assert state["pages_in_use"] == 0
