"""SIGKILL and SIGTERM of each process while it is idle, computes a prompt, or streams (P12): what can go on
does, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.server.live import Server

LONG = {"prompt": list(range(5, 205)), "max_tokens": 300, "ignore_eos": True, "temperature": 0}
GRAMMAR = {"prompt": "a", "max_tokens": 8, "regex": "[ab]{3,9}"}


class Killing:
    """A server of which something is about to be killed."""

    def __init__(self, model: Path, folder: Path, phase: str) -> None:
        self.folder, self.phase = folder, phase
        self.shared_memory = set(os.listdir("/dev/shm"))
        self.server = Server(model, "--chunked-prefill-size", "64", "--drain-timeout", "60")
        assert self.ask(GRAMMAR)["choices"]  # now there is a sandbox
        self.golden = self.ask(LONG)["choices"][0]["text"]
        self.server.http.post("/flush_cache")
        self.processes = psutil.Process(self.server.process.pid).children(recursive=True)

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.server.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def victim(self, kind: str) -> psutil.Process:
        if kind == "api":
            return psutil.Process(self.server.process.pid)
        (found,) = (p for p in self.processes if f"trunkline.{kind}" in " ".join(p.cmdline()))
        return found

    def strike(self, kind: str, number: signal.Signals) -> str | None:
        """Returns what the client saw: all of the stream, None if it was cut or there was none."""
        if self.phase == "idle":
            self.victim(kind).send_signal(number)
            return None
        try:
            body = {**LONG, "stream": True}
            with self.server.http.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                text = ""
                if self.phase == "streaming":
                    text += next(lines)
                self.victim(kind).send_signal(number)
                return text + "\n".join(lines)
        except httpx.TransportError:
            return None

    def assert_nothing_is_left(self) -> None:
        end = time.monotonic() + 10
        psutil.wait_procs(self.processes, timeout=10)
        alive = [p for p in self.processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        assert not alive
        while list(self.folder.iterdir()) and time.monotonic() < end:
            time.sleep(0.02)
        assert list(self.folder.iterdir()) == []
        assert set(os.listdir("/dev/shm")) <= self.shared_memory


@pytest.fixture
def killing(
    request: pytest.FixtureRequest,
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Killing]:
    folder = tmp_path_factory.mktemp("k")
    monkeypatch.setenv("TMPDIR", str(folder))
    made = Killing(tiny_model, folder, request.param)
    yield made
    if made.server.process.poll() is None:
        made.server.process.kill()
    if not made.server.log.closed:
        made.server.stop()


SLOW = [pytest.param(phase, marks=pytest.mark.slow) for phase in ("idle", "prefilling")]
in_phases = pytest.mark.parametrize("killing", ["streaming", *SLOW], indirect=True)
only_slow = pytest.mark.slow


@in_phases
def test_kill_the_server(killing: Killing, tiny_model: Path) -> None:
    killing.strike("api", signal.SIGKILL)
    killing.server.process.wait(timeout=10)
    killing.assert_nothing_is_left()
    again = Server(tiny_model)
    assert again.http.post("/v1/completions", json={**LONG, "max_tokens": 300}).status_code == 200
    assert again.stop()[0] == 0
    killing.assert_nothing_is_left()


@only_slow
@in_phases
def test_terminate_the_server(killing: Killing) -> None:
    seen = killing.strike("api", signal.SIGTERM)
    assert seen is None or seen.endswith("data: [DONE]\n")
    assert killing.server.process.wait(timeout=30) == 0
    killing.assert_nothing_is_left()


@only_slow
@in_phases
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_core(killing: Killing, number: signal.Signals) -> None:
    seen = killing.strike("engine.process", number)
    server = killing.server
    if number is signal.SIGKILL:
        assert seen is None or "engine_dead" in seen
        server.wait(lambda: server.http.get("/health").status_code == 503, 10)
        server.wait(lambda: server.http.get("/health").status_code == 200, 60)
    else:
        assert seen is None or (seen.endswith("data: [DONE]\n") and "error" not in seen)
    assert killing.ask(LONG)["choices"][0]["text"] == killing.golden
    killing.processes += psutil.Process(server.process.pid).children(recursive=True)
    assert server.stop()[0] == 0
    killing.assert_nothing_is_left()


@in_phases
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=only_slow)])
def test_the_grammar_sandbox(killing: Killing, number: signal.Signals) -> None:
    seen = killing.strike("grammar.sandbox", number)
    assert seen is None or (seen.endswith("data: [DONE]\n") and "error" not in seen)
    assert killing.ask({**GRAMMAR, "regex": "[cd]{3,9}"})["choices"]
    assert killing.ask(LONG)["choices"][0]["text"] == killing.golden
    killing.processes += psutil.Process(killing.server.process.pid).children(recursive=True)
    assert killing.server.stop()[0] == 0
    killing.assert_nothing_is_left()
