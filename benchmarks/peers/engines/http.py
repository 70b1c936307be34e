"""A server as a child process, and token ids sent to it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from typing import Any


class Server:
    """A running server. `started_at`: time.monotonic() just before its process was made."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], started_at: float) -> None:
        self.port = port
        self.process = process
        self.started_at = started_at

    def post(self, path: str, body: dict[str, object]) -> dict[str, Any]:
        """The JSON answer. Raises OSError or HTTPException when there is none, or its status is not 200."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
            if response.status != 200:
                raise HTTPException(f"status {response.status}: {text[:300]!r}")
            found: dict[str, Any] = json.loads(text)
            return found
        finally:
            connection.close()

    def first_post(self, path: str, body: dict[str, object]) -> dict[str, Any]:
        """`post`, tried again until the server listens and has loaded its model."""
        while True:
            try:
                return self.post(path, body)
            except (ConnectionError, HTTPException) as error:
                if self.process.poll() is not None:
                    raise ChildProcessError(f"the server ended with {self.process.returncode}") from error
                if isinstance(error, HTTPException) and "status 503" not in str(error):
                    raise
                time.sleep(0.005)


@contextmanager
def serve(command: list[str]) -> Iterator[Server]:
    """Start `command --port N`; end it afterwards. Its output goes to our standard error."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started_at = time.monotonic()
    process = subprocess.Popen([*command, "--port", str(port)], stdout=sys.stderr)
    try:
        yield Server(port, process, started_at)
    finally:
        process.terminate()
        process.wait()
