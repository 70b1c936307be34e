"""A server whose event loop stands still says so, writes its stacks down, and ends (P10)."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from pathlib import Path

import httpx
import psutil

from tests.server.live import Server
from trunkline.server.stall import EXIT_CODE, StallWatch

BLOCKS = """
import sys, time
import trunkline.server.info as info
async def models(self, request): time.sleep(1000)
info._Info.models = models
from trunkline.cli.main import main
sys.exit(main())
"""


async def test_a_loop_that_runs_is_left_alone() -> None:
    ended = threading.Event()
    watch = StallWatch(asyncio.get_running_loop(), 0.5, ended.set)
    for _ in range(60):
        await asyncio.sleep(0.02)
        time.sleep(0.01)
    watch.stop()
    assert not ended.is_set()


async def test_a_loop_that_stands_still_is_noticed() -> None:
    ended = threading.Event()
    watch = StallWatch(asyncio.get_running_loop(), 0.2, ended.set)
    assert ended.wait(10)  # blocks the loop
    watch.stop()


def test_a_server_that_stands_still_ends_with_its_stacks(tiny_model: Path) -> None:
    server = Server(tiny_model, "--watchdog-timeout", "2", program=("-c", BLOCKS))
    core = server.core()
    with contextlib.suppress(httpx.TransportError):
        server.http.get("/v1/models", timeout=30)
    assert server.process.wait(timeout=30) == EXIT_CODE
    psutil.wait_procs([core], timeout=10)
    assert not core.is_running()
    output = server.stop()[1]
    assert "stands still" in output and "in models" in output
