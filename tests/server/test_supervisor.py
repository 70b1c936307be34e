"""Several API processes before one engine: what they share, what outlives each of them, how they end."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.server.live import Server
from tests.server.test_metrics import samples
from trunkline.config.schema import EngineConfig, ModelConfig, ServerConfig
from trunkline.server.supervisor import part_of

TWO = ("--tokenizer-worker-num", "2", "--drain-timeout", "60")
LONG = {"prompt": "hello", "max_tokens": 1500, "ignore_eos": True, "temperature": 0}


class Two:
    """A server of two API processes, with a kept connection to each."""

    def __init__(self, model: Path, *flags: str) -> None:
        self.server = Server(model, *TWO, *flags)
        self.connect()

    def connect(self) -> None:
        """Connections go to whichever process takes them: open some until there is one to each."""
        found: dict[int, httpx.Client] = {}

        def both() -> bool:
            client = httpx.Client(base_url=self.server.url, timeout=60)
            if found.setdefault(self.pid_of(client), client) is not client:
                client.close()
            return len(found) == 2

        self.server.wait(both, 60)
        self.clients = [client for _, client in sorted(found.items())]

    @staticmethod
    def pid_of(client: httpx.Client) -> int:
        return int(client.get("/server_info").json()["process"]["pid"])

    def running(self, at: int) -> int:
        state = self.clients[at].get("/server_info").json()["internal_states"][0]
        return int(state["running"] + state["waiting"])

    def processes(self) -> list[psutil.Process]:
        return psutil.Process(self.server.process.pid).children(recursive=True)

    def one(self, part: str) -> psutil.Process:
        return next(p for p in self.processes() if part in " ".join(p.cmdline()))

    def stop(self) -> tuple[int, str]:
        for client in self.clients:
            client.close()
        return self.server.stop()


@pytest.fixture(scope="module")
def two(tiny_model: Path) -> Iterator[Two]:
    made = Two(tiny_model)
    yield made
    code, log = made.stop()
    assert code == 0, log


def test_metrics_of_either_process_are_those_of_all(two: Two) -> None:
    before = samples(two.clients[0].get("/metrics").text)
    used = 0
    for tokens, client in zip((3, 5), two.clients, strict=True):
        answer = client.post("/v1/completions", json={**LONG, "max_tokens": tokens}).json()
        used += answer["usage"]["completion_tokens"]
    assert used == 8
    for client in two.clients:
        after = samples(client.get("/metrics").text)
        grown = {name: value - before[name] for name, value in after.items() if name in before}
        assert grown["trunkline:generation_tokens_total"] == used
        assert grown["trunkline:num_requests_total"] == 2
        assert grown["trunkline:e2e_request_latency_seconds_count"] == 2
        assert after["trunkline:http_requests_active"] == 1
        core = client.get("/server_info").json()["internal_states"][0]
        assert after["trunkline:engine_steps_total"] <= core["steps"]


def test_a_request_is_known_by_its_id_in_all_processes(two: Two) -> None:
    first, second = two.clients
    body = {**LONG, "rid": "mine", "n": 2}
    with ThreadPoolExecutor(1) as pool:
        assert second.post("/pause_generation", json={"mode": "in_place"}).status_code == 200
        answer = pool.submit(first.post, "/v1/completions", json=body)
        two.server.wait(lambda: two.running(1) == 2, 10)
        refused = second.post("/v1/completions", json={**LONG, "rid": "mine-0"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "duplicate_rid")
        assert second.post("/abort_request", json={"rid": "other"}).status_code == 200
        assert two.running(1) == 2
        assert second.post("/abort_request", json={"rid": "mine"}).status_code == 200
        reasons = [choice["finish_reason"] for choice in answer.result().json()["choices"]]
        assert second.post("/continue_generation", json={}).status_code == 200
    assert reasons == ["abort", "abort"]
    two.server.wait(lambda: two.running(0) == 0, 5)


def test_what_lives_in_one_process_is_refused_by_name(two: Two) -> None:
    http = two.clients[0]
    for answer in (
        http.post("/open_session", json={"capacity_of_str_len": 100}),
        http.post("/close_session", json={"session_id": "x"}),
        http.get("/effective_parameters/x"),
        http.post("/configure_logging", json={"log_requests": True}),
    ):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (501, "needs_one_process")
        assert "--tokenizer-worker-num 1" in error["message"]
    body = {"input": "hello", "max_output_tokens": 2}
    assert http.post("/v1/responses", json=body).json()["store"] is False
    refused = http.post("/v1/responses", json={**body, "store": True}).json()["error"]
    assert refused["param"] == "store" and "--tokenizer-worker-num 1" in refused["message"]


def test_an_api_process_dies(two: Two) -> None:
    """Its requests end in the engine, those of the other go on, what it counted stays, another one comes."""
    victim, other = two.clients
    pid = two.pid_of(victim)
    golden = other.post("/v1/completions", json=LONG).json()["choices"][0]["text"]
    counted = samples(other.get("/metrics").text)["trunkline:num_requests_total"]
    other.post("/pause_generation", json={"mode": "in_place"})
    with ThreadPoolExecutor(2) as pool:
        lost = pool.submit(victim.post, "/v1/completions", json=LONG)
        kept = pool.submit(other.post, "/v1/completions", json=LONG)
        two.server.wait(lambda: two.running(1) == 2, 10)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            lost.result()
        two.server.wait(lambda: two.running(1) == 1, 10)  # while no step runs: it was aborted
        other.post("/continue_generation", json={})
        assert kept.result().json()["choices"][0]["text"] == golden
    two.server.wait(lambda: two.running(1) == 0, 10)
    metrics = samples(other.get("/metrics").text)
    assert metrics["trunkline:num_requests_total"] >= counted + 1
    assert metrics["trunkline:http_requests_active"] == 1
    for client in two.clients:
        client.close()
    two.connect()
    assert pid not in [two.pid_of(client) for client in two.clients]
    assert two.clients[0].get("/health_generate").status_code == 200
    assert two.clients[1].get("/health_generate").status_code == 200


def test_the_engine_dies(two: Two) -> None:
    two.one("engine.process").kill()
    for at in (0, 1):
        two.server.wait(lambda at=at: two.clients[at].get("/health").status_code == 503, 10)
    for at in (0, 1):
        two.server.wait(lambda at=at: two.clients[at].get("/health").status_code == 200, 60)
        answer = two.clients[at].post("/v1/completions", json={**LONG, "max_tokens": 3})
        assert answer.json()["usage"]["completion_tokens"] == 3


@pytest.mark.slow
def test_files_and_batches_are_shared(tiny_model: Path, tmp_path: Path) -> None:
    """Uploaded, asked for and cancelled at either process; each line has one result, though the process that
    runs them dies on the way."""
    two = Two(tiny_model, "--file-storage-path", str(tmp_path / "files"))
    first, second = two.clients

    def batch(lines: int, tokens: int) -> str:
        body = {**LONG, "max_tokens": tokens}
        url = "/v1/completions"
        rows = [{"custom_id": f"id-{i}", "method": "POST", "url": url, "body": body} for i in range(lines)]
        text = "\n".join(map(json.dumps, rows)).encode()
        form = {"files": {"file": ("in.jsonl", text)}, "data": {"purpose": "batch"}}
        file = first.post("/v1/files", **form).json()["id"]
        assert second.get(f"/v1/files/{file}/content").content == text
        made = second.post(
            "/v1/batches", json={"input_file_id": file, "endpoint": url, "completion_window": "24h"}
        )
        return str(made.json()["id"])

    def state(client: httpx.Client, key: str) -> dict[str, Any]:
        found: dict[str, Any] = client.get(f"/v1/batches/{key}").json()
        return found

    def results(client: httpx.Client, found: dict[str, Any]) -> list[str]:
        text = ""
        for name in ("output_file_id", "error_file_id"):
            if found[name] is not None:
                text += client.get(f"/v1/files/{found[name]}/content").text
        return sorted(json.loads(row)["custom_id"] for row in text.splitlines())

    whole = batch(20, 5)
    two.server.wait(lambda: state(first, whole)["status"] == "completed", 60)
    assert state(second, whole)["request_counts"] == {"total": 20, "completed": 20, "failed": 0}
    assert results(first, state(first, whole)) == sorted(f"id-{i}" for i in range(20))

    cancelled = batch(400, 200)
    two.server.wait(lambda: state(first, cancelled)["request_counts"]["completed"] >= 3, 60)
    for client in two.clients:
        assert client.post(f"/v1/batches/{cancelled}/cancel").json()["status"] in ("cancelling", "cancelled")
    two.server.wait(lambda: state(second, cancelled)["status"] == "cancelled", 30)
    assert results(second, state(second, cancelled)) == sorted(f"id-{i}" for i in range(400))

    survives = batch(60, 100)
    two.server.wait(lambda: state(first, survives)["request_counts"]["completed"] >= 3, 60)
    (lock,) = (tmp_path / "files").glob("runner-*.lock")
    (runner,) = (p.pid for p in two.processes() if str(lock) in [file.path for file in p.open_files()])
    os.kill(runner, signal.SIGKILL)
    for client in two.clients:
        client.close()
    two.connect()
    two.server.wait(lambda: state(two.clients[0], survives)["status"] == "completed", 60)
    done = state(two.clients[1], survives)
    assert done["request_counts"] == {"total": 60, "completed": 60, "failed": 0}
    assert results(two.clients[1], done) == sorted(f"id-{i}" for i in range(60))
    code, log = two.stop()
    assert code == 0 and "Traceback" not in log, log


# ---------------------------------------------------------------------- ends
class Ending:
    """Two processes of which something is about to end; what they leave behind is looked at."""

    def __init__(self, model: Path, folder: Path, *flags: str) -> None:
        self.folder = folder
        self.two = Two(model, *flags)
        self.processes = self.two.processes()
        assert len(self.processes) >= 3

    def assert_nothing_is_left(self) -> None:
        _, alive = psutil.wait_procs(self.processes, timeout=10)
        assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
        end = time.monotonic() + 10
        while list(self.folder.iterdir()) and time.monotonic() < end:
            time.sleep(0.02)
        assert list(self.folder.iterdir()) == []


@pytest.fixture
def ending(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Ending]:
    folder = tmp_path_factory.mktemp("s")
    monkeypatch.setenv("TMPDIR", str(folder))
    made = Ending(tiny_model, folder)
    yield made
    if made.two.server.process.poll() is None:
        made.two.server.process.kill()
    if not made.two.server.log.closed:
        made.two.stop()


def stream(client: httpx.Client, begun: list[int]) -> str:
    with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
        lines = response.iter_lines()
        text = next(lines)
        begun.append(1)
        return text + "\n".join(lines)


@pytest.mark.parametrize("whole_group", [pytest.param(False, marks=pytest.mark.slow), True])
def test_sigterm_drains_all(ending: Ending, whole_group: bool) -> None:
    """Service managers may signal each process of a service: that is one signal, not two."""
    server, begun = ending.two.server, list[int]()
    with ThreadPoolExecutor(2) as pool:
        streams = [pool.submit(stream, client, begun) for client in ending.two.clients]
        server.wait(lambda: len(begun) == 2, 10)
        for process in ending.processes if whole_group else []:
            process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGTERM)
        for each in streams:
            text = each.result()
            assert text.endswith("data: [DONE]\n") and '"finish_reason":"length"' in text
    assert server.process.wait(timeout=30) == 0
    ending.assert_nothing_is_left()


def test_a_killed_supervisor_leaves_nothing(ending: Ending) -> None:
    ending.two.server.process.kill()
    ending.two.server.process.wait(timeout=10)
    ending.assert_nothing_is_left()


def is_worker(process: psutil.Process) -> bool:
    try:
        return "server.worker" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # or a zombie: it died a moment ago
        return False


@pytest.mark.slow
def test_processes_that_keep_dying_end_the_server(ending: Ending) -> None:
    server, killed = ending.two.server, set[int]()
    while server.process.poll() is None:
        found = [p for p in ending.two.processes() if is_worker(p)]
        ending.processes += found
        for process in found:
            if process.pid not in killed:
                killed.add(process.pid)
                process.kill()
        time.sleep(0.1)
    code, log = ending.two.stop()
    assert code == 2 and "API processes died 4 times" in log, log
    ending.assert_nothing_is_left()


@pytest.mark.slow
def test_a_unix_socket_is_shared(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    server = Server(tiny_model, *TWO, "--uds", str(path))
    pids = set[int]()

    def both() -> bool:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://x") as client:
            pids.add(Two.pid_of(client))
        return len(pids) == 2

    server.wait(both, 60)
    processes = psutil.Process(server.process.pid).children(recursive=True)
    server.process.kill()
    server.process.wait(timeout=10)
    psutil.wait_procs(processes, timeout=10)
    assert not path.exists()
    server.stop()


def test_limits_are_shared_out_exactly() -> None:
    server = ServerConfig(processes=3, max_concurrent=11)
    config = EngineConfig(model=ModelConfig(path="m", seed=5), server=server)
    parts = [part_of(config, slot, slot + 1) for slot in range(3)]
    assert [part.server.max_concurrent for part in parts] == [4, 4, 3]
    assert len({part.model.seed for part in parts}) == 3


def test_a_start_that_fails_says_why(tiny_model: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jinja"
    bad.write_text("{% for %}")
    with pytest.raises(AssertionError, match=r"bad\.jinja"):
        Server(tiny_model, *TWO, "--chat-template", str(bad))
