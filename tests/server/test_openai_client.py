"""The official openai client against a real server: everything here but chat and completions, which
test_live.py has; and batches across servers that are killed."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.server.test_live import Server

MAX = 12


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    files = tmp_path_factory.mktemp("files")
    server = Server(
        tiny_model, "--served-model-name", "tiny", "--api-key", "k", "--file-storage-path", str(files)
    )
    server.http.headers["authorization"] = "Bearer k"
    yield server
    code, output = server.stop()
    assert code == 0, output


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="k", max_retries=0) as client:
        yield client


# ---------------------------------------------------------------------- embeddings
def test_embeddings(client: openai.OpenAI, server: Server) -> None:
    texts = [f"text {i} of several" for i in range(5)]
    by_base64 = client.embeddings.create(model="tiny", input=texts)  # the client's own choice
    numbers = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    for one, other in zip(by_base64.data, numbers.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-7)
        assert sum(number * number for number in one.embedding) == pytest.approx(1, abs=1e-5)
    assert len({tuple(entry.embedding) for entry in numbers.data}) == 5
    assert by_base64.usage.prompt_tokens == by_base64.usage.total_tokens > 5
    alone = client.embeddings.create(model="tiny", input=texts[3], encoding_format="float")
    assert alone.data[0].embedding == numbers.data[3].embedding
    short = client.embeddings.create(model="tiny", input=texts[3], encoding_format="float", dimensions=8)
    assert len(short.data[0].embedding) == 8
    ids = server.http.post("/v1/tokenize", json={"prompt": texts[3]}).json()["tokens"]
    for given in (ids, [ids]):
        same = client.embeddings.create(model="tiny", input=given, encoding_format="float")
        assert same.data[0].embedding == alone.data[0].embedding
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="tiny", input=texts, dimensions=10**6)
    assert caught.value.param == "dimensions"


async def test_embeddings_async(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="k") as client:
        answers = await asyncio.gather(
            *(client.embeddings.create(model="tiny", input=f"text {i}") for i in range(8))
        )
    assert len({tuple(answer.data[0].embedding) for answer in answers}) == 8


# ---------------------------------------------------------------------- responses
def test_responses(client: openai.OpenAI) -> None:
    first = client.responses.create(
        model="tiny", input="hello", instructions="Answer.", max_output_tokens=MAX, temperature=0,
        metadata={"for": "test"}, store=True, top_logprobs=2, include=["message.output_text.logprobs"],
    )  # fmt: skip
    assert first.object == "response" and first.metadata == {"for": "test"} and first.usage is not None
    assert first.status in ("completed", "incomplete") and first.usage.output_tokens <= MAX
    message = first.output[0]
    assert message.type == "message" and message.content[0].type == "output_text"
    assert message.content[0].text == first.output_text and message.content[0].logprobs
    again = client.responses.retrieve(first.id)
    assert again == first
    items = client.responses.input_items.list(first.id)
    assert [item.content[0].text for item in items] == ["hello"]  # type: ignore[union-attr]
    second = client.responses.create(
        model="tiny", input="go on", previous_response_id=first.id, max_output_tokens=MAX, temperature=0
    )
    typed: Any = [
        {"role": "user", "content": "hello"}, *first.output, {"role": "user", "content": "go on"}
    ]  # fmt: skip
    by_hand = client.responses.create(model="tiny", input=typed, max_output_tokens=MAX, temperature=0)
    assert by_hand.output_text == second.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="tiny", input="a", tools=[{"type": "web_search"}])
    assert caught.value.param == "tools[0].type"


def test_responses_stream(client: openai.OpenAI) -> None:
    """With an output that comes to its own end: the client knows no other final response."""
    form = {"type": "json_schema", "name": "x", "schema": {"enum": ["one two three", "four"]}}
    asked: Any = {"model": "tiny", "input": "hello", "text": {"format": form}, "temperature": 0}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == whole.output_text and final.usage == whole.usage
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed" == f"response.{final.status}"
    plain = [event.type for event in client.responses.create(**asked, stream=True)]
    assert plain == kinds


async def test_responses_async(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="k") as client:
        asked: Any = {"model": "tiny", "input": "hello", "max_output_tokens": MAX, "temperature": 0}
        whole = await client.responses.create(**asked)
        text = ""
        async for event in await client.responses.create(**asked, stream=True):
            if event.type == "response.output_text.delta":
                text += event.delta
    assert text == whole.output_text


def test_responses_structured(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    schema["additionalProperties"] = False
    answer = client.responses.create(
        model="tiny", input="a?", max_output_tokens=40,
        text={"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}},
    )  # fmt: skip
    assert isinstance(json.loads(answer.output_text)["a"], bool)


def test_responses_in_the_background(client: openai.OpenAI) -> None:
    long = client.responses.create(
        model="tiny", input="hello", background=True, max_output_tokens=1000, extra_body={"ignore_eos": True}
    )
    assert long.status == "queued"
    assert client.responses.cancel(long.id).status == "cancelled"
    short = client.responses.create(model="tiny", input="hello", background=True, max_output_tokens=4)
    deadline = time.monotonic() + 60
    while (now := client.responses.retrieve(short.id)).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert now.status in ("completed", "incomplete") and now.output


# ---------------------------------------------------------------------- files and batches
def lines(count: int, **body: Any) -> bytes:
    made = [
        {
            "custom_id": f"id-{i}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "tiny", "messages": [{"role": "user", "content": f"number {i}"}], **body},
        }
        for i in range(count)
    ]
    return "\n".join(map(json.dumps, made)).encode()


def test_files_and_batches(client: openai.OpenAI) -> None:
    file = client.files.create(file=("in.jsonl", io.BytesIO(lines(5, max_tokens=4))), purpose="batch")
    assert client.files.retrieve(file.id) == file and file.id in [one.id for one in client.files.list()]
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"a": "b"}
    )
    done = wait_for(client, batch.id)
    assert done.status == "completed" and done.output_file_id and done.error_file_id is None
    assert done.request_counts is not None and done.request_counts.completed == 5
    texts = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
    assert [one["custom_id"] for one in texts] == [f"id-{i}" for i in range(5)]
    assert batch.id in [one.id for one in client.batches.list(limit=1)]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)


def wait_for(client: openai.OpenAI, key: str) -> Any:
    deadline = time.monotonic() + 120
    while True:
        batch = client.batches.retrieve(key)
        if batch.status in ("completed", "failed", "expired", "cancelled"):
            return batch
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)


def test_a_killed_server_loses_and_repeats_nothing(tiny_model: Path, tmp_path: Path) -> None:
    """Killed twice on the way: each line has one result in the end, the one that was written first."""
    count, flags = 60, ("--served-model-name", "tiny", "--file-storage-path", str(tmp_path / "files"))
    written: dict[str, bytes] = {}
    key = ""
    for run in range(3):
        server = Server(tiny_model, *flags, "--max-batch-requests", "2")
        with openai.OpenAI(base_url=server.url + "/v1", api_key="-") as client:
            if run == 0:
                content = io.BytesIO(lines(count, max_tokens=24, ignore_eos=True, temperature=1.0))
                file = client.files.create(file=("in.jsonl", content), purpose="batch")
                key = client.batches.create(
                    input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
                ).id
            if run < 2:
                done = 0
                while done < 15 * (run + 1):
                    counts = client.batches.retrieve(key).request_counts
                    assert counts is not None
                    done = counts.completed
                core = server.core()
                server.process.kill()
                server.stop()
                with contextlib.suppress(psutil.Error):
                    core.wait(30)
                now = stored_results(tmp_path / "files")
                assert all(now[name] == body for name, body in written.items()) and len(now) < count
                written = now
            else:
                batch = wait_for(client, key)
                found = client.files.content(batch.output_file_id).text.splitlines()
                code, output = server.stop()
                assert code == 0, output
    assert batch.status == "completed" and batch.request_counts.completed == count
    by_id = {json.loads(line)["custom_id"]: line.encode() for line in found}
    assert len(found) == count and set(by_id) == {f"id-{i}" for i in range(count)}
    assert len(written) >= 30 and all(by_id[name] == body for name, body in written.items())


def stored_results(folder: Path) -> dict[str, bytes]:
    import sqlite3

    with contextlib.closing(sqlite3.connect(folder / "index.sqlite3")) as db:
        bodies = [body for (body,) in db.execute("SELECT body FROM results")]
    return {json.loads(body)["custom_id"]: body for body in bodies}


# ---------------------------------------------------------------------- scores
def test_score_and_rerank(server: Server) -> None:
    body = {
        "model": "tiny",
        "query": "q ",
        "items": ["a", "b"],
        "label_token_ids": [5, 6],
        "apply_softmax": True,
    }
    scores = server.http.post("/v1/score", json=body).json()["scores"]
    assert [sum(row) for row in scores] == pytest.approx([1, 1])
    ranked = server.http.post(
        "/v1/rerank", json={"query": "q", "documents": ["a", "b", "c"], "top_n": 2}
    ).json()
    assert len(ranked) == 2 and ranked[0]["score"] >= ranked[1]["score"]
