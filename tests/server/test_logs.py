"""Logs, dumps and the replay of dumps: nothing that a user wrote gets out unasked."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from tests.server.conftest import http_client, make_app
from tests.server.fake_client import FakeClient
from tests.server.live import Server
from trunkline.cli import replay
from trunkline.config.schema import EngineConfig, ObserveConfig
from trunkline.engine.dump import shape_of
from trunkline.engine.logs import JsonFormatter
from trunkline.text.tokenizer import Tokenizer
from trunkline.types import RequestError

SECRET = "my secret plan"
CHAT = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 6}
ROUTE = "/v1/chat/completions"


def with_observe(config: EngineConfig, **changes: Any) -> EngineConfig:
    return msgspec.structs.replace(config, observe=ObserveConfig(**changes))


def lines_of(caplog: pytest.LogCaptureFixture, name: str) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == name]


# ---------------------------------------------------------------------- ids and the access log
@pytest.mark.parametrize(
    ("sent", "kept"), [("abc-1.2_3:x", True), ("a b", False), ("x" * 129, False), ('"inject', False)]
)
async def test_request_ids_of_clients(http: httpx.AsyncClient, sent: str, kept: bool) -> None:
    response = await http.get("/health", headers={"x-request-id": sent})
    assert (response.headers["x-request-id"] == sent) is kept


async def test_the_access_log_as_json(http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    await http.get("/health", headers={"x-request-id": "me"})
    (record,) = lines_of(caplog, "trunkline.access")
    line = json.loads(JsonFormatter().format(record))
    wanted = {"method": "GET", "path": "/health", "status": 200, "request_id": "me", "level": "info"}
    assert {name: line[name] for name in wanted} == wanted and line["millis"] >= 0


# ---------------------------------------------------------------------- the log of calls
@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("form", ["text", "json"])
async def test_levels(
    client: FakeClient, tokenizer: Tokenizer, config: EngineConfig, caplog: pytest.LogCaptureFixture,
    level: int, form: str,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO)
    settings = with_observe(config, log_requests=True, log_requests_level=level, log_requests_format=form)
    async with http_client(make_app(client, tokenizer, settings)) as http:
        answer = (await http.post(ROUTE, json={**CHAT, "rid": "r1", "top_p": 0.625})).json()
    reply = answer["choices"][0]["message"]["content"]
    begun, ended = (record.getMessage() for record in lines_of(caplog, "trunkline.requests"))
    assert "r1" in begun and "r1" in ended
    assert ("0.625" in begun) is (level >= 1)
    assert (SECRET in begun) is (level >= 2)
    escaped = json.dumps(reply, ensure_ascii=False)[1:-1]
    assert (escaped in ended) is (level >= 2)
    if form == "json":
        assert json.loads(ended)["completions"][0]["completion_tokens"] == 6


async def test_level_two_shows_beginnings_only(
    client: FakeClient, tokenizer: Tokenizer, config: EngineConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    body = {"input_ids": [5] * 440, "sampling_params": {"max_new_tokens": 2}}
    text = {"text": "x " * 100 + "THE END", "sampling_params": {"max_new_tokens": 2}}
    for level, shown in ((2, False), (3, True)):
        settings = with_observe(config, log_requests=True, log_requests_level=level)
        async with http_client(make_app(client, tokenizer, settings)) as http:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("trunkline.server.request_log.BEGINNING", 50)
                assert (await http.post("/generate", json=body)).status_code == 200
                assert (await http.post("/generate", json=text)).status_code == 200
        messages = " ".join(record.getMessage() for record in lines_of(caplog, "trunkline.requests"))
        assert ("THE END" in messages) is shown
        caplog.clear()


async def test_logging_is_configured_while_it_runs(
    client: FakeClient, tokenizer: Tokenizer, config: EngineConfig, caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO)
    settings = with_observe(config, crash_dump_folder=str(tmp_path / "dumps"))
    async with http_client(make_app(client, tokenizer, settings)) as http:
        await http.post(ROUTE, json=CHAT)
        assert not lines_of(caplog, "trunkline.requests")
        below = str(tmp_path / "dumps" / "all")
        fields = {"log_requests": True, "log_requests_level": 0, "log_requests_format": "json"}
        dumps = {"dump_requests_folder": below, "dump_requests_threshold": 2}
        answer = (await http.post("/configure_logging", json={**fields, **dumps})).json()
        assert answer["dump_requests_folder"] == below and answer["log_requests_level"] == 0
        for _ in range(3):
            await http.post(ROUTE, json=CHAT)
        assert len(lines_of(caplog, "trunkline.requests")) == 6
        (dump,) = Path(below).iterdir()
        assert len(dump.read_text().splitlines()) == 1 + 2
        for folder in ("/", str(tmp_path), str(tmp_path / "dumps" / ".." / "out")):
            refused = await http.post("/configure_logging", json={"dump_requests_folder": folder})
            assert refused.json()["error"]["code"] == "folder_not_allowed"
        answer = (await http.post("/configure_logging", json={"dump_requests_folder": ""})).json()
        assert answer["dump_requests_folder"] is None
        assert len(list(Path(below).iterdir())) == 2  # what was pending is written


# ---------------------------------------------------------------------- dumps
def test_shapes_hold_nothing_that_a_user_wrote() -> None:
    body = {
        **CHAT, "model": "tiny", "temperature": 0.5, "stop": [SECRET], "logit_bias": {SECRET: 3},
        "response_format": {"type": "json_schema", "json_schema": {"schema": {SECRET: SECRET}}},
        "tools": [{"function": {"name": SECRET}}], "prompt": [1, 2, 3], "sampling_params": {"regex": SECRET},
    }  # fmt: skip
    shape = shape_of(body)
    assert SECRET not in json.dumps(shape)
    assert shape["temperature"] == 0.5 and shape["max_tokens"] == 6 and shape["model"] == "tiny"
    assert shape["messages"] == [{"role": "user", "content": {"characters": len(SECRET)}}]
    assert shape["prompt"] == {"integers": 3}


def test_a_folder_that_cannot_be_written_to(
    client: FakeClient, tokenizer: Tokenizer, config: EngineConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError) as caught:
        make_app(client, tokenizer, with_observe(config, crash_dump_folder=str(tmp_path / "file" / "x")))
    assert caught.value.code == "bad_folder"


def test_crash_dump_replay_report(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engine is killed while a request runs: a dump is written; replayed, it shows what is the same, and
    where outputs are made to differ, that they do."""
    flags = ["--served-model-name", "tiny", "--crash-dump-folder", str(tmp_path)]
    server = Server(tiny_model, *flags, "--crash-dump-prompts")
    bodies = [
        (ROUTE, {**CHAT, "n": 2}),
        ("/generate", {"text": ["a", "b c"], "sampling_params": {"max_new_tokens": 5}}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 4, "stream": True}),
        ("/generate", {"text": "seeded", "sampling_params": {"max_new_tokens": 5, "sampling_seed": 7}}),
    ]
    try:
        for route, body in bodies:
            assert server.http.post(route, json=body).status_code == 200
        long = {"prompt": "x", "max_tokens": 1500, "ignore_eos": True, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=long) as stream:
            pieces = stream.iter_text()  # held: when it goes, so does the connection
            next(pieces)
            server.core().kill()
            server.wait(lambda: any(tmp_path.glob("crash-*.jsonl")), 20)
        (dump,) = tmp_path.glob("crash-*.jsonl")
        assert os.stat(dump).st_mode & 0o077 == 0
        head, calls = replay.read_dump(dump)
        assert "SIGKILL" in head["reason"]
        assert [call["state"] for call in calls] == ["finished"] * 4 + ["running"]
        server.wait(lambda: server.http.get("/health").status_code == 200, 60)
        assert replay.run([str(dump), "--url", server.url, "--arrivals", "serial"]) == 0
        assert "5 requests, 1 of them running at the dump; 0 came out differently" in capsys.readouterr().out
        lines = dump.read_text().splitlines()
        changed = json.loads(lines[1])
        changed["completions"][1]["output_digest"] = "00000000"
        (tmp_path / "changed").write_text("\n".join([lines[0], json.dumps(changed), *lines[2:]]))
        words = [str(tmp_path / "changed"), "--url", server.url, "--arrivals", "together"]
        assert replay.run(words) == 1
        said = capsys.readouterr().out
        assert "other output: digest" in said and "1 came out differently" in said
        assert replay.run([*words, "--json"]) == 1
        assert [json.loads(line)["status"] for line in capsys.readouterr().out.splitlines()] == [200] * 5
    finally:
        server.stop()


def test_a_dump_without_prompts_is_replayed_with_others(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(tiny_model, "--served-model-name", "tiny", "--crash-dump-folder", str(tmp_path))
    try:
        assert server.http.post(ROUTE, json=CHAT).status_code == 200
        server.core().kill()
        server.wait(lambda: any(tmp_path.glob("crash-*.jsonl")), 20)
        server.wait(lambda: server.http.get("/health").status_code == 200, 60)
        (dump,) = tmp_path.glob("crash-*.jsonl")
        assert SECRET not in dump.read_text()
        assert replay.run([str(dump), "--url", server.url]) == 0
        assert "outputs can't be compared" in capsys.readouterr().out
    finally:
        server.stop()


def test_files_that_are_no_dumps(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("{}")
    (tmp_path / "b").write_text("nope")
    for name, code in (("a", "bad_dump"), ("b", "bad_dump"), ("c", "file_not_found")):
        with pytest.raises(RequestError) as caught:
            replay.run([str(tmp_path / name)])
        assert caught.value.code == code
