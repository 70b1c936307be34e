"""Anthropic's Messages API: what is sent, and what becomes of the answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import trunkline as sgl
from tests.pure.lang.fake_server import FakeServer, Reply
from trunkline.types import RequestError


def answer(path: str, body: Any) -> Reply:
    if body.get("stream"):
        return [
            {"type": "message_start", "message": {}},
            {"type": "content_block_start", "index": 0},
            {"type": "ping"},
            *({"type": "content_block_delta", "delta": {"type": "text_delta", "text": c}} for c in "reply"),
            {
                "type": "message_delta",
                "delta": {"stop_reason": "end_turn"},
                "usage": {"output_tokens": 2},
            },
            {"type": "message_stop"},
        ]
    content = [{"type": "text", "text": "re"}, {"type": "text", "text": "ply"}]
    return 200, {
        "content": content,
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 9, "output_tokens": 2},
    }


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer(answer).running() as server:
        yield server


@pytest.fixture
def backend(server: FakeServer) -> sgl.Anthropic:
    return sgl.Anthropic("claude", api_key="k", base_url=server.url)


@sgl.function
def chat(s: Any, start: str = "") -> None:
    s += sgl.system("be brief") + sgl.user("hi")
    s += sgl.assistant(start + sgl.gen("a", max_tokens=9, stop=["\n\n"], top_k=5))


@pytest.mark.parametrize("stream", [False, True])
def test_chat(server: FakeServer, backend: sgl.Anthropic, stream: bool) -> None:
    state = chat.run(backend=backend, stream=stream, temperature=0.5)
    assert "".join(state.text_iter("a")) == "reply"
    meta = state.get_meta_info("a")
    assert meta["finish_reason"] == {"type": "end_turn"} and meta["completion_tokens"] == 2
    ((path, body, headers),) = server.requests
    assert path == "/v1/messages" and headers["x-api-key"] == "k" and headers["anthropic-version"]
    body.pop("stream", None)
    assert body == {
        "model": "claude",
        "system": "be brief",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 9,
        "stop_sequences": ["\n\n"],
        "temperature": 0.5,
        "top_k": 5,
    }


def test_the_start_of_a_turn_is_continued(server: FakeServer, backend: sgl.Anthropic) -> None:
    state = chat.run(start="Well, ", backend=backend)
    assert state.messages()[-1]["content"] == "Well, reply"
    assert server.requests[0][1]["messages"][-1] == {"role": "assistant", "content": "Well,"}


def test_plain_text_is_a_user_turn(server: FakeServer, backend: sgl.Anthropic) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "tell me" + sgl.gen("a")

    assert program.run(backend=backend)["a"] == "reply"
    assert server.requests[0][1]["messages"] == [{"role": "user", "content": "tell me"}]


def test_images(server: FakeServer, backend: sgl.Anthropic, tmp_path: Path) -> None:
    file = tmp_path / "i.gif"
    file.write_bytes(b"GIF89a")

    @sgl.function
    def look(s: Any) -> None:
        s += sgl.user("what? " + sgl.image(str(file)))
        s += sgl.assistant(sgl.gen("a"))

    look.run(backend=backend).sync()
    text, image = server.requests[0][1]["messages"][0]["content"]
    assert text["text"].startswith("what?")
    assert image["source"] == {"type": "base64", "media_type": "image/gif", "data": "R0lGODlh"}


def test_json_schema(server: FakeServer, backend: sgl.Anthropic) -> None:
    @sgl.function
    def program(s: Any, schema: str) -> None:
        s += sgl.user("hi") + sgl.assistant(sgl.gen("a", json_schema=schema))

    program.run('{"type": "integer"}', backend=backend).sync()
    (body,) = [body for _, body, _ in server.requests]
    assert body["output_config"] == {"format": {"type": "json_schema", "schema": {"type": "integer"}}}
    with pytest.raises(RequestError, match="json_schema is no JSON"):
        program.run("{", backend=backend).sync()
    assert len(server.requests) == 1


def test_what_it_can_not_do(
    server: FakeServer, backend: sgl.Anthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    @sgl.function
    def in_user(s: Any) -> None:
        s += sgl.user(sgl.gen("a"))

    @sgl.function
    def regex(s: Any) -> None:
        s += sgl.gen("a", regex="x")

    for program, message in ((in_user, "inside the user's turn"), (regex, "does not support regex")):
        with pytest.raises(RequestError, match=message):
            program.run(backend=backend).sync()
    assert server.requests == []
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    with pytest.raises(RequestError, match="set ANTHROPIC_API_KEY"):
        sgl.Anthropic("claude")
