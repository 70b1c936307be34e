"""The README's examples run as they stand, against a server started as it says (on another port)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import find_free_port
from tools.check.documents import FENCE
from trunkline.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = [(kind, text) for kind, text in FENCE.findall((ROOT / "README.md").read_text())]
START_SECONDS = 60


def blocks(kind: str, word: str) -> list[str]:
    found = [text for language, text in BLOCKS if language == kind and word in text]
    assert found, f"the README has no {kind} block with {word!r}"
    return found


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the bundled model, started by the program that `make serve` starts."""
    port = find_free_port()
    log = tmp_path_factory.mktemp("readme") / "server.log"
    program = [sys.executable, "-m", "trunkline.cli.main", "serve", "--port", str(port), "--cpu-threads", "1"]
    with log.open("wb") as output, subprocess.Popen(program, stdout=output, stderr=output) as server:
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}/health", server, log)
            yield f"127.0.0.1:{port}"
        finally:
            server.terminate()
            try:
                status = server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                status = -9
        assert status == 0, log.read_text()


def wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                if reply.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the server did not get healthy:\n{log.read_text()}")


def run(program: list[str]) -> str:
    result = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_curl(address: str) -> None:
    for block in blocks("bash", "curl"):
        reply = json.loads(
            run(["bash", "-ec", block.replace("127.0.0.1:30000", address).replace("curl", "curl -sS")])
        )
        assert "32" in reply["choices"][0]["message"]["content"]
        assert reply["choices"][0]["finish_reason"] == "stop"


def test_openai_client(address: str) -> None:
    for block in blocks("python", "OpenAI("):
        out = run([sys.executable, "-c", block.replace("127.0.0.1:30000", address)])
        whole, streamed = out.strip().split("\n", 1)
        assert "32" in whole
        assert streamed == whole


def test_offline_engine() -> None:
    for block in blocks("python", "Engine("):
        lines = run([sys.executable, "-c", block]).strip().split("\n")
        assert len(lines) >= 2 and all("type" in line for line in (lines[0], lines[-1]))


def test_commands_exist() -> None:
    listed = {
        name
        for block in blocks("bash", "trunkline ")
        for name in re.findall(r"^trunkline ([a-z-]+)", block, re.M)
    }
    assert listed == {command.name for command in COMMANDS}
