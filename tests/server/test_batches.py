"""/v1/files and /v1/batches over a fake core: one result for each line, whatever happens on the way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from tests.server.conftest import http_client, make_app
from tests.server.fake_client import FakeClient
from trunkline.config.schema import EngineConfig
from trunkline.server import batch_runner
from trunkline.server.batch_runner import PRIORITY, BatchRunner, check_lines
from trunkline.server.storage import Storage, lines_of
from trunkline.text.tokenizer import Tokenizer
from trunkline.types import FinishReason, RequestError

CHAT = "/v1/chat/completions"
Api = httpx.AsyncClient
HI = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


@pytest.fixture
def stored(config: EngineConfig, tmp_path: Path) -> EngineConfig:
    server = replace(config.server, file_storage_path=str(tmp_path / "files"), batch_running=3)
    return replace(config, server=server)


@asynccontextmanager
async def serving(
    client: FakeClient, tokenizer: Tokenizer, config: EngineConfig
) -> AsyncIterator[httpx.AsyncClient]:
    """The application with its jobs, as a server runs it."""
    app = make_app(client, tokenizer, config)
    jobs = [asyncio.create_task(job()) for job in app.jobs]
    try:
        async with http_client(app) as http:
            yield http
    finally:
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)


@pytest.fixture
async def api(
    client: FakeClient, tokenizer: Tokenizer, stored: EngineConfig
) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(client, tokenizer, stored) as http:
        yield http


def line(custom_id: str, body: dict[str, Any], url: str = CHAT) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


async def upload(api: Api, lines: list[str], purpose: str = "batch") -> str:
    files = {"file": ("in.jsonl", "\n".join(lines).encode())}
    response = await api.post("/v1/files", files=files, data={"purpose": purpose})
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


async def start(api: Api, lines: list[str], url: str = CHAT, window: str = "24h") -> str:
    body = {"input_file_id": await upload(api, lines), "endpoint": url, "completion_window": window}
    response = await api.post("/v1/batches", json={**body, "metadata": {"for": "test"}})
    assert response.status_code == 200, response.text
    assert response.json()["status"] == "validating"
    return str(response.json()["id"])


async def until(api: Api, key: str, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    for _ in range(1000):
        batch: dict[str, Any] = (await api.get(f"/v1/batches/{key}")).json()
        if done(batch):
            return batch
        await asyncio.sleep(0.01)
    raise AssertionError(f"still so: {batch}")


async def ended(api: Api, key: str) -> dict[str, Any]:
    return await until(
        api, key, lambda batch: batch["status"] in ("completed", "failed", "expired", "cancelled")
    )


async def results(api: Api, batch: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By custom id; each occurs once."""
    found: dict[str, dict[str, Any]] = {}
    for name in ("output_file_id", "error_file_id"):
        if batch[name] is not None:
            for text in (await api.get(f"/v1/files/{batch[name]}/content")).text.splitlines():
                result = json.loads(text)
                assert result["custom_id"] not in found
                found[result["custom_id"]] = result
    return found


# ---------------------------------------------------------------------- files
async def test_files(api: Api) -> None:
    first, second = await upload(api, ["a"]), await upload(api, ["b", "c"], "user_data")
    file = (await api.get(f"/v1/files/{second}")).json()
    assert file.pop("created_at") > 0
    assert file == {
        "id": second, "object": "file", "bytes": 3, "filename": "in.jsonl", "purpose": "user_data",
        "expires_at": None, "status": "processed", "status_details": None,
    }  # fmt: skip
    assert (await api.get(f"/v1/files/{second}/content")).content == b"b\nc"

    async def ids(**query: Any) -> list[str]:
        return [file["id"] for file in (await api.get("/v1/files", params=query)).json()["data"]]

    assert await ids() == [second, first] and await ids(order="asc") == [first, second]
    assert await ids(purpose="batch") == [first] and await ids(limit=1) == [second]
    assert await ids(after=second) == [first]
    assert (await api.delete(f"/v1/files/{first}")).json() == {"id": first, "object": "file", "deleted": True}
    for response in (await api.get(f"/v1/files/{first}"), await api.delete(f"/v1/files/{first}")):
        assert response.status_code == 404 and response.json()["error"]["code"] == "file_not_found"
    assert await ids() == [second]


@pytest.mark.parametrize(
    ("files", "data", "code"),
    [
        ({}, {"purpose": "batch", "file": "text"}, "invalid_type"),
        ({"file": ("x", b"a")}, {}, "missing_field"),
        ({"other": ("x", b"a")}, {"purpose": "batch"}, "unknown_field"),
        ({"file": ("x", b"a")}, {"purpose": "fine-tune"}, "invalid_value"),
        ({"file": ("x", b"a")}, {"purpose": "batch", "expires_after[anchor]": "created_at"}, "unknown_field"),
        ({"file": ("x", b"a" * 20001)}, {"purpose": "batch"}, "file_too_large"),
        ({"file": ("x", b"a" * 200_000)}, {"purpose": "batch"}, "file_too_large"),
    ],
)
async def test_bad_uploads(
    api: Api,
    stored: EngineConfig,
    monkeypatch: pytest.MonkeyPatch,
    files: Any,
    data: dict[str, str],
    code: str,
) -> None:
    monkeypatch.setattr("trunkline.server.files.MAX_FILE", 20000)
    response = await api.post("/v1/files", files=files, data=data)
    assert response.status_code in (400, 413, 415) and response.json()["error"]["code"] == code, response.text
    assert not list(Path(stored.server.file_storage_path).glob("file-*"))


async def test_a_broken_form(api: Api) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    response = await api.post("/v1/files", content=b"--x\r\nnonsense", headers=headers)
    assert response.status_code == 400, response.text


async def test_the_storage_has_an_end(client: FakeClient, tokenizer: Tokenizer, stored: EngineConfig) -> None:
    small = replace(stored, server=replace(stored.server, file_storage_bytes=10))
    async with serving(client, tokenizer, small) as api:
        await upload(api, ["12345678"])
        response = await api.post("/v1/files", files={"file": ("x", b"123")}, data={"purpose": "batch"})
        assert response.status_code == 413 and response.json()["error"]["code"] == "storage_full"
    assert len(list(Path(stored.server.file_storage_path).glob("file-*"))) == 1
    async with serving(
        client, tokenizer, replace(stored, server=replace(stored.server, file_storage_bytes=0))
    ) as api:
        assert (await api.get("/v1/files")).json()["error"]["code"] == "storage_disabled"


# ---------------------------------------------------------------------- batches
async def test_a_batch(api: Api, client: FakeClient) -> None:
    bad = {"messages": [], "max_tokens": 3}
    key = await start(
        api,
        [
            *(line(f"id-{i}", HI) for i in range(8)),
            line("bad", bad),
            "",
            line("stream", {**HI, "stream": True}),
        ],
    )
    batch = await ended(api, key)
    assert batch["status"] == "completed" and batch["request_counts"] == {
        "total": 10,
        "completed": 8,
        "failed": 2,
    }
    assert batch["metadata"] == {"for": "test"} and batch["completed_at"] >= batch["created_at"]
    found = await results(api, batch)
    assert set(found) == {*(f"id-{i}" for i in range(8)), "bad", "stream"}
    direct = (await api.post(CHAT, json=HI)).json()
    good = found["id-3"]
    assert good["error"] is None and good["response"]["status_code"] == 200
    assert good["response"]["body"]["choices"] == direct["choices"]
    assert good["response"]["body"]["usage"] == direct["usage"]
    assert found["bad"]["response"]["status_code"] == 400
    assert found["bad"]["response"]["body"]["error"]["param"] == "messages"
    assert found["stream"]["response"]["body"]["error"]["param"] == "stream"
    assert {request.priority for request in client.added[:-1]} == {PRIORITY}
    names = [file["filename"] for file in (await api.get("/v1/files?purpose=batch_output")).json()["data"]]
    assert sorted(names) == [f"{key}_error.jsonl", f"{key}_output.jsonl"]
    listed = (await api.get("/v1/batches")).json()
    assert [one["id"] for one in listed["data"]] == [key] and listed["has_more"] is False


@pytest.mark.parametrize(
    ("url", "body", "show"),
    [
        ("/v1/completions", {"prompt": "hi", "max_tokens": 3}, lambda body: body["choices"][0]["text"]),
        ("/v1/embeddings", {"input": "hi"}, lambda body: body["data"][0]["embedding"]),
        ("/v1/responses", {"input": "hi"}, lambda body: body["output"][0]["content"][0]["text"]),
    ],
)
async def test_other_endpoints(api: Api, url: str, body: Any, show: Callable[[Any], Any]) -> None:
    batch = await ended(api, await start(api, [line("a", body, url)], url))
    direct = (await api.post(url, json=body)).json()
    assert show((await results(api, batch))["a"]["response"]["body"]) == show(direct)


async def test_a_file_that_is_not_valid_fails_as_a_whole(api: Api, client: FakeClient) -> None:
    lines = [
        line("a", HI),
        "{",
        "[]",
        line("a", HI),
        line("b", HI, "/v1/completions"),
        json.dumps({"custom_id": "c"}),
    ]
    batch = await ended(api, await start(api, lines))
    assert batch["status"] == "failed" and batch["failed_at"]
    problems = [(error["line"], error["code"], error["param"]) for error in batch["errors"]["data"]]
    assert problems == [
        (2, "invalid_json", None),
        (3, "invalid_type", None),
        (4, "duplicate_custom_id", "custom_id"),
        (5, "invalid_value", "url"),
        (6, "missing_field", "method"),
    ]
    assert not client.added
    empty = await ended(api, await start(api, [" "]))
    assert empty["errors"]["data"][0]["code"] == "empty_file"


def test_lines_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in"
    path.write_text("\n".join([line("a", HI), "x" * 5000, line("b", HI)]))
    total, errors = check_lines(lines_of(path, 1000), CHAT, 1000)
    assert total == 3 and [(error["line"], error["code"]) for error in errors] == [(2, "body_too_large")]
    monkeypatch.setattr(batch_runner, "MAX_LINES", 1)
    assert check_lines(lines_of(path, 9999), CHAT, 9999)[1][-1]["code"] == "too_many_lines"


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"input_file_id": "file-x"}, 404, "file_not_found", "input_file_id"),
        ({"input_file_id": None}, 400, "missing_field", "input_file_id"),
        ({"endpoint": "/v1/images"}, 400, "invalid_value", "endpoint"),
        ({"completion_window": "soon"}, 400, "invalid_value", "completion_window"),
        ({"completion_window": "31d"}, 400, "invalid_value", "completion_window"),
        ({"output_expires_after": {"seconds": 1}}, 400, "unsupported_field", "output_expires_after"),
        ({"other": 1}, 400, "unknown_field", "other"),
    ],
)
async def test_bad_batches(api: Api, change: Any, status: int, code: str, param: str) -> None:
    body = {"input_file_id": await upload(api, [line("a", HI)]), "endpoint": CHAT, "completion_window": "24h"}
    response = await api.post("/v1/batches", json={**body, **change})
    assert response.status_code == status, response.text
    assert (response.json()["error"]["code"], response.json()["error"]["param"]) == (code, param)


async def test_a_file_of_another_purpose(api: Api) -> None:
    file = await upload(api, [line("a", HI)], "user_data")
    body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
    assert (await api.post("/v1/batches", json=body)).json()["error"]["param"] == "input_file_id"


async def test_live_batches_are_bounded(
    api: Api, monkeypatch: pytest.MonkeyPatch, client: FakeClient
) -> None:
    client.delay = 0.05
    monkeypatch.setattr("trunkline.server.batches.MAX_LIVE", 1)
    await start(api, [line("a", HI)])
    body = {"input_file_id": await upload(api, [line("a", HI)]), "endpoint": CHAT, "completion_window": "24h"}
    response = await api.post("/v1/batches", json=body)
    assert response.status_code == 429 and response.json()["error"]["code"] == "too_many_batches"


# ---------------------------------------------------------------------- on the way
async def test_cancel(api: Api, client: FakeClient) -> None:
    client.delay = 0.02
    lines = [line(f"id-{i}", HI) for i in range(60)]
    key = await start(api, lines)
    await until(api, key, lambda batch: batch["request_counts"]["completed"] >= 3)
    file = (await api.get(f"/v1/batches/{key}")).json()["input_file_id"]
    assert (await api.delete(f"/v1/files/{file}")).json()["error"]["code"] == "file_in_use"
    cancelled = (await api.post(f"/v1/batches/{key}/cancel")).json()
    assert cancelled["status"] in ("cancelling", "cancelled")
    batch = await ended(api, key)
    assert batch["status"] == "cancelled" and batch["cancelled_at"] and batch["cancelling_at"]
    found = await results(api, batch)
    assert set(found) == {f"id-{i}" for i in range(60)}
    codes = [result["error"]["code"] for result in found.values() if result["error"]]
    assert codes and set(codes) == {"batch_cancelled"}
    assert batch["request_counts"]["completed"] == 60 - len(codes) >= 3
    assert not client.live
    assert (await api.post(f"/v1/batches/{key}/cancel")).json()["status"] == "cancelled"
    assert (await api.delete(f"/v1/files/{file}")).status_code == 200


async def test_a_batch_that_is_over_is_not_cancelled(api: Api) -> None:
    key = await start(api, [line("a", HI)])
    await ended(api, key)
    response = await api.post(f"/v1/batches/{key}/cancel")
    assert response.status_code == 409 and response.json()["error"]["code"] == "not_cancellable"
    assert (await api.post("/v1/batches/batch_x/cancel")).status_code == 404
    assert (await api.get("/v1/batches/batch_x")).json()["error"]["code"] == "batch_not_found"


async def test_the_window_ends(api: Api, client: FakeClient) -> None:
    client.delay = 0.05
    batch = await ended(api, await start(api, [line(f"id-{i}", HI) for i in range(100)], window="1s"))
    assert batch["status"] == "expired" and batch["expired_at"]
    found = await results(api, batch)
    assert len(found) == 100
    assert {result["error"]["code"] for result in found.values() if result["error"]} == {"batch_expired"}


async def test_lines_wait_for_room_and_are_tried_again(
    api: Api, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_runner, "RETRY", 0.01)
    client.refusal = FinishReason("abort", message="full", code="queue_full", status=429)
    key = await start(api, [line("a", HI), line("b", HI)])
    await until(api, key, lambda batch: len(client.added) >= 4)
    assert (await api.get(f"/v1/batches/{key}")).json()["request_counts"]["failed"] == 0
    client.refusal = None
    batch = await ended(api, key)
    assert batch["request_counts"] == {"total": 2, "completed": 2, "failed": 0}


async def test_an_abort_is_no_result(api: Api, client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_runner, "RETRY", 0.01)
    client.delay = 0.05
    key = await start(api, [line("a", {**HI, "rid": "mine"})])
    while "mine" not in client.live:
        await asyncio.sleep(0.005)
    await client.abort("mine")
    batch = await ended(api, key)
    (result,) = (await results(api, batch)).values()
    assert result["response"]["body"]["choices"][0]["finish_reason"] == "length" and len(client.added) == 2


async def test_interactive_requests_go_first(api: Api, client: FakeClient) -> None:
    """No line starts while requests fill the engine (8 rows here)."""
    client.delay = 0.05
    busy = [asyncio.create_task(api.post(CHAT, json={**HI, "max_tokens": 10})) for _ in range(8)]
    while len(client.live) < 8:
        await asyncio.sleep(0.005)
    key = await start(api, [line("a", HI)])
    await until(api, key, lambda batch: batch["status"] == "in_progress")
    await asyncio.sleep(0.1)
    assert len(client.added) == 8
    await asyncio.gather(*busy)
    assert (await ended(api, key))["status"] == "completed"


# ---------------------------------------------------------------------- a server that ends, and the next one
async def test_the_next_server_goes_on(
    client: FakeClient, tokenizer: Tokenizer, stored: EngineConfig
) -> None:
    client.delay = 0.01
    async with serving(client, tokenizer, stored) as api:
        key = await start(api, [line(f"id-{i}", {**HI, "rid": f"id-{i}"}) for i in range(40)])
        await until(api, key, lambda batch: batch["request_counts"]["completed"] >= 10)
    first = len(client.added) - len(client.left_early)
    assert not client.live
    async with serving(client, tokenizer, stored) as api:
        batch = await ended(api, key)
        found = await results(api, batch)
    assert batch["request_counts"] == {"total": 40, "completed": 40, "failed": 0}
    assert set(found) == {f"id-{i}" for i in range(40)}
    again = [request.rid for request in client.added]
    repeated = {rid for rid in again if again.count(rid) > 1}
    assert repeated <= set(client.left_early) and 10 <= first < 40  # what had ended was not run again


@pytest.mark.parametrize("status", ["cancelled", "expired"])
async def test_an_input_file_that_vanishes_ends_its_batch(
    api: Api, client: FakeClient, stored: EngineConfig, status: str
) -> None:
    """Removed by hand: what did not run can't be listed any more, what did is kept, and no try is in vain."""
    client.delay = 0.05
    key = await start(
        api,
        [line(f"id-{i}", HI) for i in range(300)],
        window="2s" if status == "expired" else "24h",  # in whole seconds: it may be one less
    )
    batch = await until(api, key, lambda batch: batch["request_counts"]["completed"] >= 3)
    (Path(stored.server.file_storage_path) / batch["input_file_id"]).unlink()
    if status == "cancelled":
        await api.post(f"/v1/batches/{key}/cancel")
    batch = await ended(api, key)
    (problem,) = batch["errors"]["data"]
    assert (batch["status"], problem["code"]) == ("failed", "file_gone")
    assert batch["input_file_id"] in problem["message"]
    assert batch["request_counts"]["completed"] == len(await results(api, batch)) >= 3
    gone = await api.get(f"/v1/files/{batch['input_file_id']}/content")
    assert (gone.status_code, gone.json()["error"]["code"]) == (410, "file_gone")


async def test_an_input_file_that_vanishes_before_the_next_server(
    client: FakeClient, tokenizer: Tokenizer, stored: EngineConfig
) -> None:
    client.delay = 0.05
    async with serving(client, tokenizer, stored) as api:
        key = await start(api, [line(f"id-{i}", HI) for i in range(60)])
        batch = await until(api, key, lambda batch: batch["request_counts"]["completed"] >= 3)
    (Path(stored.server.file_storage_path) / batch["input_file_id"]).unlink()
    async with serving(client, tokenizer, stored) as api:
        batch = await ended(api, key)
    assert (batch["status"], batch["errors"]["data"][0]["code"]) == ("failed", "file_gone")


async def test_of_two_servers_one_runs_a_batch(
    client: FakeClient, tokenizer: Tokenizer, stored: EngineConfig
) -> None:
    other = FakeClient(client.script, eos=2, vocab_size=client.vocab_size)
    async with serving(client, tokenizer, stored) as api, serving(other, tokenizer, stored) as second:
        await ended(api, await start(api, [line("first", HI)]))
        batch = await ended(second, await start(second, [line("second", HI)]))
        assert batch["status"] == "completed"
    assert sorted([len(client.added), len(other.added)]) == [0, 2]


async def test_a_batch_is_ended_in_one_transaction(tmp_path: Path) -> None:
    """Killed while its files are written: nothing of it is there, and the next try writes them whole."""
    storage = Storage(tmp_path, 1000)
    batch = {"id": "batch_1", "status": "in_progress", "input_file_id": "x", "request_counts": {"total": 1}}
    await storage.run(storage.add_batch, batch, "me", 5)
    await storage.run(storage.add_result, "batch_1", 1, False, b"{}")
    await storage.run(storage.add_result, "batch_1", 1, False, b"another")

    def broken() -> None:
        storage._set = None  # type: ignore[assignment]
        try:
            storage.finish_batch("batch_1", ("in_progress",), status="completed")
        finally:
            del storage._set

    with pytest.raises(TypeError):
        await storage.run(broken)
    assert (await storage.run(storage.batch, "batch_1") or {})["status"] == "in_progress"
    assert await storage.run(storage.files, None, None, 10, True) == []
    done = await storage.run(lambda: storage.finish_batch("batch_1", ("in_progress",), status="completed"))
    assert done is not None and done["request_counts"] == {"total": 1, "completed": 1, "failed": 0}
    assert storage.path(done["output_file_id"]).read_bytes() == b"{}\n"
    storage.close()


def dies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends before a batch's end is written, as far as the storage can tell."""

    def killed(*_: Any, **__: Any) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(Storage, "finish_batch", killed)


@pytest.mark.parametrize("status", ["expired", "cancelled"])
async def test_killed_before_the_end_is_written(
    client: FakeClient,
    tokenizer: Tokenizer,
    stored: EngineConfig,
    monkeypatch: pytest.MonkeyPatch,
    status: str,
) -> None:
    """All lines have their result, but the batch is not over: it ends as it would have."""
    client.delay = 0.05
    lines = [line(f"id-{i}", HI) for i in range(100)]
    with monkeypatch.context() as patch:
        dies(patch)
        async with serving(client, tokenizer, stored) as api:
            key = await start(api, lines, window="1s" if status == "expired" else "24h")
            if status == "cancelled":
                await until(api, key, lambda batch: batch["request_counts"]["completed"] > 0)
                await api.post(f"/v1/batches/{key}/cancel")
            filled = await until(api, key, lambda batch: sum(batch["request_counts"].values()) == 200)
    assert filled["status"] == ("finalizing" if status == "expired" else "cancelling")
    asked = len(client.added)
    async with serving(client, tokenizer, stored) as api:
        batch = await ended(api, key)
        found = await results(api, batch)
    assert batch["status"] == status and len(found) == 100 and len(client.added) == asked
    assert {r["error"]["code"] for r in found.values() if r["error"]} == {f"batch_{status}"}


def results_left(config: EngineConfig) -> int:
    path = Path(config.server.file_storage_path) / "index.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as db:
        (rows,) = db.execute("SELECT count(*) FROM results").fetchone()
        (used,) = db.execute("SELECT bytes FROM used").fetchone()
        (files,) = db.execute("SELECT coalesce(sum(bytes), 0) FROM files").fetchone()
    assert rows or used == files
    return int(rows)


async def test_a_batch_that_fails_on_the_way_keeps_what_has_finished(
    api: Api, client: FakeClient, stored: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = BatchRunner._run_line

    async def broken(self: Any, batch: Any, number: int, text: bytes) -> None:
        if number == 3:
            await asyncio.sleep(0.2)
            raise ValueError("a fault")
        await run(self, batch, number, text)

    monkeypatch.setattr(BatchRunner, "_run_line", broken)
    batch = await ended(api, await start(api, [line(f"id-{i}", HI) for i in range(3)]))
    assert (batch["status"], batch["errors"]["data"][0]["code"]) == ("failed", "internal_error")
    assert batch["failed_at"] and set(await results(api, batch)) == {"id-0", "id-1"}
    assert batch["request_counts"] == {"total": 3, "completed": 2, "failed": 0}
    assert results_left(stored) == 0


async def test_results_count_against_the_bound(
    client: FakeClient, tokenizer: Tokenizer, stored: EngineConfig
) -> None:
    lines = [line(f"id-{i}", HI) for i in range(40)]
    most = len("\n".join(lines)) + 5000
    small = replace(stored, server=replace(stored.server, file_storage_bytes=most))
    async with serving(client, tokenizer, small) as api:
        batch = await ended(api, await start(api, lines))
        found = await results(api, batch)
        files = (await api.get("/v1/files")).json()["data"]
    (problem,) = batch["errors"]["data"]
    assert (batch["status"], problem["code"]) == ("failed", "storage_full")
    assert "--file-storage-size" in problem["message"] and str(most) in problem["message"]
    assert 0 < len(found) < 40 and batch["request_counts"]["completed"] == len(found)
    assert most - 1000 < sum(file["bytes"] for file in files) <= most
    assert results_left(stored) == 0


async def test_a_disk_that_refuses_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    storage = Storage(tmp_path / "file", 10)
    with pytest.raises(RequestError) as caught:
        await storage.run(storage.files, None, None, 1, True)
    assert (caught.value.code, caught.value.status) == ("storage_failed", 507)
    storage.close()
