"""A server of one's own: spawned, used as a backend, ended with the program."""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
import time
import urllib.request
import weakref
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

from trunkline.config.cli import from_kwargs
from trunkline.config.flags import Args
from trunkline.lang.backends.runtime_endpoint import RuntimeEndpoint
from trunkline.lang.global_config import global_config
from trunkline.text.tokenizer import Tokenizer
from trunkline.types import RequestError

STOP_TIME = 30.0  # seconds between the request to stop and the end by force


class Runtime:
    """A `trunkline serve` process on a free port (`port` or above), and its `endpoint`.

        runtime = Runtime(model_path="...")
        set_default_backend(runtime)

    Keyword arguments are the server's flags with underscores; unknown ones are refused by name. Raises
    RequestError when the server ends, or isn't ready within `launch_timeout` seconds. It ends with
    `shutdown`, with the last reference, or with this process, even if that is killed."""

    def __init__(self, log_level: str = "error", launch_timeout: float = 300.0, **server_args: Any) -> None:
        words = {**server_args, "log_level": log_level}
        args = from_kwargs(words, Args)
        words["port"] = self.port = free_port(args.host, args.port)
        self.url = f"http://{args.host}:{self.port}"
        command = [sys.executable, "-m", "trunkline.lang.backends.lifeline", "trunkline.launch_server"]
        out = None if log_level in ("debug", "info") else subprocess.DEVNULL  # errors go to stderr
        process = subprocess.Popen([*command, *_flags(words)], stdin=subprocess.PIPE, stdout=out)
        self.pid = process.pid
        self._close = weakref.finalize(self, _end, process)
        try:
            self._wait(process, launch_timeout, args.api_key)
            self.endpoint = RuntimeEndpoint(self.url, api_key=args.api_key)
        except BaseException:
            self.shutdown()
            raise

    def _wait(self, process: subprocess.Popen[bytes], seconds: float, api_key: str | None) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if process.poll() is not None:
                raise RequestError(
                    f"the server ended with status {process.returncode} before it was ready",
                    code="server_ended",
                    status=503,
                )
            try:
                with urllib.request.urlopen(f"{self.url}/health_generate", timeout=30) as reply:
                    if reply.status == 200:
                        return
            except OSError:
                time.sleep(0.05)
        raise RequestError(
            f"the server was not ready within {seconds:g} s (launch_timeout)",
            code="launch_timeout",
            status=503,
        )

    def shutdown(self) -> None:
        """End the server. May be called twice."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    # ------------------------------------------------------------------ use without a program
    def generate(self, prompt: str | list[str], sampling_params: Any = None, **fields: Any) -> Any:
        """The answer of POST /generate; `fields` are its fields."""
        call = {"text": prompt, "sampling_params": sampling_params, **fields}
        return global_config.run(self.endpoint.call(call))

    async def async_generate(
        self, prompt: str, sampling_params: Any = None, **fields: Any
    ) -> AsyncGenerator[str, None]:
        """New text as it comes. May be used from any event loop."""
        call, shown = {"text": prompt, "sampling_params": sampling_params, **fields}, 0
        async with aclosing(global_config.each(self.endpoint.stream(call))) as answers:
            async for answer in answers:
                yield answer["text"][shown:]
                shown = len(answer["text"])

    add_request = async_generate

    def get_tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.endpoint.tokenizer_path)

    def __getattr__(self, name: str) -> Any:
        """The rest is the endpoint's: encode, cache_prefix, flush_cache, get_server_info, start_profile."""
        if name.startswith("_") or name == "endpoint":
            raise AttributeError(name)
        return getattr(self.endpoint, name)


def free_port(host: str, first: int) -> int:
    """The first port from `first` on that nothing listens on. Raises OSError when there is none."""
    for port in itertools.count(first):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                return port
            except OSError:
                if port >= min(first + 1000, 65535):
                    raise
    raise AssertionError


def _flags(words: dict[str, Any]) -> list[str]:
    """Command-line flags of keyword arguments: lists become several words, True a bare flag."""
    found: list[str] = []
    for name, value in words.items():
        flag = f"--{name.replace('_', '-')}"
        if value is None or value is False:
            continue
        values = value if isinstance(value, list | tuple) else [] if value is True else [value]
        found += [flag, *map(str, values)]
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(STOP_TIME)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
