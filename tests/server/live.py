"""A running `trunkline serve`, as a process of its own."""

from __future__ import annotations

import contextlib
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil

from tests.conftest import find_free_port


class Server:
    """A running `trunkline serve`."""

    def __init__(
        self,
        model: Path,
        *flags: str,
        program: tuple[str, ...] = ("-m", "trunkline.cli.main"),
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self.port = find_free_port()
        scheme = "https" if "--ssl-certfile" in flags else "http"
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        command = [sys.executable, *program, "serve", "--model-path", str(model), "--port", str(self.port)]
        command += ["--max-total-tokens", "16384", "--cpu-threads", "1", *flags]
        # Not a pipe: nobody reads it meanwhile, and it would fill up.
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)
        transport = None
        if "--uds" in flags:
            path = flags[flags.index("--uds") + 1]
            self.wait(Path(path).exists, 60)  # the client leaks the sockets of failed connections
            transport = httpx.HTTPTransport(uds=path)
        self.http = httpx.Client(base_url=self.url, timeout=60, verify=verify, transport=transport)
        self.wait(lambda: self.http.get("/health").status_code == 200, 60)

    def wait(self, condition: Callable[[], bool], seconds: float) -> float:
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            assert self.process.poll() is None, self.stop()
            with contextlib.suppress(httpx.TransportError):
                if condition():
                    return time.monotonic() - started
            time.sleep(0.02)
        self.process.kill()
        raise AssertionError(f"not within {seconds} s: {self.stop()}")

    def core(self) -> psutil.Process:
        (core,) = [
            p for p in psutil.Process(self.process.pid).children() if p.status() != psutil.STATUS_ZOMBIE
        ]
        return core

    def pages_in_use(self) -> float:
        states = self.http.get("/server_info").json()["internal_states"][0]
        return float(states["pages_in_use"] + states["running"] + states["waiting"])

    def stop(self) -> tuple[int, str]:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=90)
        self.http.close()
        with self.log:
            self.log.seek(0)
            return code, self.log.read()
