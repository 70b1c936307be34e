"""A `trunkline serve` of a benchmark's own: started with its flags on a free port, stopped afterwards."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import fields

from trunkline.config.flags import Args, flags_of, spelling
from trunkline.http import HttpClient
from trunkline.types import RequestError

START_TIMEOUT = 600.0  # seconds for a server to load


@asynccontextmanager
async def started_server(options: Args) -> AsyncIterator[tuple[str, int, float]]:
    """A `trunkline serve` of our own on a free port. Yields its URL, its process and the seconds until it
    answered."""
    port = options.port if options.port != Args.port else free_port(options.host)
    command = [sys.executable, "-m", "trunkline.launch_server", *server_words(options), "--port", str(port)]
    started = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"http://{options.host}:{port}"
    try:
        while not await _healthy(url):
            if server.poll() is not None:
                raise RequestError(f"the server ended with status {server.returncode}", code="server_ended")
            if time.perf_counter() - started > START_TIMEOUT:
                raise RequestError(f"the server did not answer in {START_TIMEOUT:.0f} s", code="no_server")
            await asyncio.sleep(0.05)
        yield url, server.pid, time.perf_counter() - started
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def server_words(options: Args) -> list[str]:
    """The engine's flags among the options, as words of a command line."""
    defaults = {f.name: f.default for f in fields(Args)}
    words: list[str] = [word for accepted in options.accepted for word in accepted.split()]
    for attribute, meta in flags_of(Args).items():
        value = getattr(options, attribute)
        if attribute != "port" and value != defaults[attribute]:
            words += [spelling(attribute)] if meta.kind == "bool" else [spelling(attribute), str(value)]
    return words


def free_port(host: str) -> int:
    with socket.create_server((host, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


async def _healthy(url: str) -> bool:
    client = HttpClient(url, tries=1)
    try:
        await client.json("GET", "/health")
    except (OSError, EOFError, RequestError):
        return False
    finally:
        client.close()
    return True
