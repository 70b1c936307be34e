"""OpenAI-compatible endpoints: what is sent, and what becomes of the answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import trunkline as sgl
from tests.pure.lang.fake_server import FakeServer, Reply
from trunkline.types import RequestError

USAGE = {"prompt_tokens": 5, "completion_tokens": 2}


def answer(path: str, body: Any) -> Reply:
    chat = path.startswith("/v1/chat")
    texts = [f"reply{i}" if body.get("n", 1) > 1 else "reply" for i in range(body.get("n", 1))]
    if body.get("stream"):
        parts: list[dict[str, Any]] = [{"delta": {"content": c}} if chat else {"text": c} for c in "reply"]
        if body.get("logprobs") is not None:
            parts = [part | {"logprobs": logprobs(c, chat)} for part, c in zip(parts, "reply", strict=True)]
        last = {"delta": {}, "finish_reason": "stop"} if chat else {"text": "", "finish_reason": "stop"}
        return [*({"choices": [part]} for part in [*parts, last]), {"choices": [], "usage": USAGE}]
    choices = [
        {"index": i, "finish_reason": "stop", **({"message": {"content": t}} if chat else {"text": t})}
        for i, t in enumerate(texts)
    ]
    if body.get("logprobs") is not None:
        choices = [choice | {"logprobs": logprobs("reply", chat)} for choice in choices]
    return 200, {"id": "1", "choices": choices[::-1], "usage": USAGE}


def logprobs(text: str, chat: bool) -> dict[str, Any]:
    if chat:
        return {"content": [{"token": c, "logprob": -float(ord(c))} for c in text], "refusal": None}
    return {"tokens": list(text), "token_logprobs": [-float(ord(c)) for c in text], "top_logprobs": None}


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer(answer).running() as server:
        yield server


def chat_model(server: FakeServer, **more: Any) -> sgl.OpenAI:
    return sgl.OpenAI("gpt", api_key="k", base_url=f"{server.url}/v1", **more)


def completion_model(server: FakeServer) -> sgl.OpenAI:
    return chat_model(server, is_chat_model=False)


@sgl.function
def chat(s: Any, **more: Any) -> None:
    s += sgl.system("be brief")
    s += sgl.user("hi")
    s += sgl.assistant(sgl.gen("a", max_tokens=9, **more))


@sgl.function
def continued(s: Any, **more: Any) -> None:
    s += "text " + sgl.gen("a", **more)


@pytest.mark.parametrize("stream", [False, True])
def test_chat(server: FakeServer, stream: bool) -> None:
    backend = chat_model(server)
    state = chat.run(backend=backend, stream=stream, temperature=0)
    assert "".join(state.text_iter("a")) == "reply"
    ((path, body, headers),) = server.requests
    assert path == "/v1/chat/completions" and headers["authorization"] == "Bearer k"
    turns = [("system", "be brief"), ("user", "hi")]
    assert body["messages"] == [{"role": role, "content": content} for role, content in turns]
    assert (body["max_tokens"], body["temperature"], body["model"]) == (9, 0, "gpt")
    assert not {"top_k", "min_p", "ignore_eos", "regex", "stop"} & body.keys()
    assert state.get_meta_info("a")["finish_reason"] == {"type": "stop"}
    assert (backend.token_usage.prompt_tokens, backend.token_usage.completion_tokens) == (5, 2)
    backend.token_usage.reset()
    assert backend.token_usage.prompt_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
def test_completion(server: FakeServer, stream: bool) -> None:
    state = continued.run(backend=completion_model(server), stream=stream)
    assert "".join(state.text_iter()) == "text reply"
    assert (server.requests[0][0], server.requests[0][1]["prompt"]) == ("/v1/completions", "text ")
    assert continued.run(n=3, backend=completion_model(server))["a"] == ["reply0", "reply1", "reply2"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_chat", [False, True])
def test_logprobs_come_whole(server: FakeServer, is_chat: bool, stream: bool) -> None:
    backend = chat_model(server, is_chat_model=is_chat)
    state = (chat if is_chat else continued).run(backend=backend, stream=stream, return_logprob=True)
    assert state["a"] == "reply"
    assert state.get_meta_info("a")["logprobs"] == logprobs("reply", is_chat)


def test_extensions_are_sent_where_they_ask_for_something(server: FakeServer) -> None:
    more: dict[str, Any] = {"top_k": 3, "min_p": 0.1, "ignore_eos": True, "min_tokens": 2, "stop": ["x"]}

    @sgl.function
    def program(s: Any) -> None:
        s += sgl.gen("a", regex="[a-z]+", json_schema='{"type": "object"}', return_logprob=True, **more)
        s += sgl.gen("b", dtype=int) + sgl.gen("c", dtype=str)

    state = program.run(backend=completion_model(server))
    assert state["c"] == '"reply"'
    first, second, third = (body for _, body, _ in server.requests)
    assert {name: first[name] for name in more if name != "min_tokens"} == {
        name: value for name, value in more.items() if name != "min_tokens"
    }
    assert first["min_tokens"] == 2 and first["regex"] == "[a-z]+" and first["logprobs"] == 0
    assert first["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert second["regex"].startswith("[-+]?[0-9]+")
    assert third["prompt"].endswith('"') and third["stop"] == ['"'] and "regex" not in third


def test_what_a_chat_model_can_not_do(server: FakeServer) -> None:
    @sgl.function
    def inside(s: Any) -> None:
        s += sgl.user("hi")
        s += sgl.assistant("well, " + sgl.gen("a"))

    @sgl.function
    def choose(s: Any) -> None:
        s += sgl.user("hi")
        s += sgl.assistant(sgl.select("a", ["x", "y"]))

    for program, message in ((inside, "must come first in an assistant's turn"), (choose, "select")):
        with pytest.raises(RequestError, match=message):
            program.run(backend=chat_model(server)).sync()
    with pytest.raises(RequestError, match="OpenAI does not support flush_cache"):
        sgl.flush_cache(chat_model(server))
    assert server.requests == []


def test_an_error_of_the_endpoint(server: FakeServer) -> None:
    server.answer = lambda path, body: (400, {"error": {"message": "regex?", "code": "u", "param": "regex"}})
    with pytest.raises(RequestError, match=r"regex\?") as caught:
        continued.run(backend=completion_model(server)).sync()
    assert (caught.value.status, caught.value.param) == (400, "regex")


def test_azure(server: FakeServer) -> None:
    backend = sgl.OpenAI(
        "gpt", is_azure=True, api_key="k", azure_endpoint=server.url, api_version="v", azure_deployment="d"
    )
    server.answer = lambda path, body: answer("/v1/chat", body)
    assert chat.run(backend=backend)["a"] == "reply"
    path, _, headers = server.requests[0]
    assert path == "/openai/deployments/d/chat/completions?api-version=v" and headers["api-key"] == "k"


def test_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(RequestError, match="set OPENAI_API_KEY"):
        sgl.OpenAI("gpt")
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert sgl.OpenAI("gpt-3.5-turbo-instruct").is_chat_model is False


# ---------------------------------------------------------------------- API speculation
def ahead(text: str) -> Any:
    return lambda path, body: (
        200,
        {"choices": [{"text": text, "message": {"content": text}}], "usage": USAGE},
    )


def test_one_call_serves_several_gens(server: FakeServer) -> None:
    server.answer = ahead("Ann.\nAge: 41.\nTown: Ulm.\nand on")

    @sgl.function(num_api_spec_tokens=64)
    def card(s: Any) -> None:
        s += "Name: " + sgl.gen("name", stop=".") + ".\nAge: " + sgl.gen("age", stop=".")
        s += ".\nTown: " + sgl.gen("town", stop=[".", "!"]) + "."

    state = card.run(backend=completion_model(server))
    assert (state["name"], state["age"], state["town"]) == ("Ann", "41", "Ulm")
    assert state.text() == "Name: Ann.\nAge: 41.\nTown: Ulm."
    ((_, body, _),) = server.requests
    assert body["max_tokens"] == 128 and "stop" not in body
    with pytest.raises(ValueError, match="can't be streamed"):
        card.run(stream=True)


def test_text_that_differs_costs_a_new_call(server: FakeServer) -> None:
    server.answer = ahead("Ann, aged 41.")

    @sgl.function(num_api_spec_tokens=64)
    def card(s: Any) -> None:
        s += "Name: " + sgl.gen("name", stop=",") + ";" + sgl.gen("more", max_tokens=3)

    state = card.run(backend=completion_model(server))
    assert (state["name"], state["more"]) == ("Ann", "Ann")
    assert [body["prompt"] for _, body, _ in server.requests] == ["Name: ", "Name: Ann;"]


def test_a_chat_turn_in_one_call(server: FakeServer) -> None:
    replies = iter(["nonsense", "Name: Ann\nAge: 41\nmore"])
    server.answer = lambda path, body: ahead(next(replies))(path, body)

    @sgl.function(num_api_spec_tokens=64)
    def card(s: Any) -> Any:
        s += sgl.user("who?")
        with s.assistant():
            s += "Name: " + sgl.gen("name", max_tokens=10) + "\nAge: "
            s += sgl.gen("age", max_tokens=10, stop="\n")
            with pytest.raises(KeyError, match="at the end of the assistant's turn"):
                _ = s["name"]
        return s["name"]

    state = card.run(backend=chat_model(server))
    assert (state.ret_value, state["age"]) == ("Ann", "41")
    assert state.messages()[-1] == {"role": "assistant", "content": "Name: Ann\nAge: 41"}
    assert len(server.requests) == 2  # the first answer did not follow the program


def test_a_chat_turn_that_never_follows(server: FakeServer) -> None:
    server.answer = ahead("nonsense")

    @sgl.function(num_api_spec_tokens=64)
    def card(s: Any) -> None:
        s += sgl.user("who?") + sgl.assistant("Name: " + sgl.gen("name"))

    with pytest.raises(RequestError, match="does not follow the program's text after 3 calls"):
        card.run(backend=chat_model(server)).sync()
