"""`trunkline bench overhead`: what the API server itself costs, with an engine that computes nothing."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]

from trunkline.bench.report import percentile, show
from trunkline.bench.server import free_port, server_words
from trunkline.config.cli import help_text, parse, wants_help
from trunkline.config.flags import Args, again, flag
from trunkline.types import RequestError

ABOUT = (
    "One API server process over a mock engine that emits a token for each request at once: streamed tokens "
    "a second over all streams, the server's CPU time for each, and the time to the first token of a lone "
    "request, which is all added by the server and this client."
)
START_TIME = 60.0  # seconds for the server to start
SERVER = "import sys; from trunkline.bench.overhead import serve; sys.exit(serve(sys.argv[1:]))"


@dataclass(frozen=True, kw_only=True)
class Options(Args):
    streams: int = flag("int", "requests at once", default=64, low=1, group="workload")
    tokens: int = flag("int", "of each of them", default=400, low=2, group="workload")
    lone: int = flag(
        "int",
        "requests one after the other, for the first token",
        default=300,
        low=1,
        group="workload",
    )
    route: str = flag(
        "text", "which interface", default="chat", choices=("chat", "completions", "generate"),
        group="workload",
    )  # fmt: skip
    json: bool = flag("bool", "print one line of JSON", group="workload")
    log_level: str = again(Args, "log_level", "error")


def run(words: list[str]) -> int:
    if wants_help(words):
        sys.stdout.write(help_text("trunkline bench overhead [FLAGS]", ABOUT, Options, hide=("host", "port")))
        return 0
    options = parse(words, Options)
    with _server(options) as (port, process):
        result = asyncio.run(_measure(options, port, process))
    show(result, as_json=options.json)
    return 0


def serve(words: list[str]) -> int:
    """The server of the benchmark: the real one, but for the module that its core runs."""
    from trunkline.config.resolve import load_config
    from trunkline.engine.client import EngineClient
    from trunkline.server.app import run_server

    run_server(
        load_config(parse(words, Args)),
        lambda config: EngineClient.launch(config, "trunkline.bench.mock_core"),
    )
    return 0


@contextmanager
def _server(options: Options) -> Iterator[tuple[int, psutil.Process]]:
    port = free_port("127.0.0.1")
    words = [*server_words(options), "--port", str(port), "--log-level", options.log_level]
    server = subprocess.Popen([sys.executable, "-c", SERVER, *words], stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        if not any(line.startswith(b"Trunkline is ready") for line in server.stdout):
            raise RequestError("the server did not start", code="server_ended")
        yield port, psutil.Process(server.pid)
    finally:
        server.terminate()
        server.communicate(timeout=30)


def _body(options: Options, tokens: int) -> tuple[str, bytes]:
    sampling = {"max_tokens": tokens, "ignore_eos": True, "stream": True}
    match options.route:
        case "generate":
            native = {"max_new_tokens": tokens, "ignore_eos": True}
            return "/generate", json.dumps({"text": "Hi", "stream": True, "sampling_params": native}).encode()
        case "completions":
            return "/v1/completions", json.dumps({"prompt": "Hi", **sampling}).encode()
    messages = [{"role": "user", "content": "Hi"}]
    return "/v1/chat/completions", json.dumps({"messages": messages, **sampling}).encode()


async def _measure(options: Options, port: int, process: psutil.Process) -> dict[str, object]:
    await _stream(options, port, 2)
    firsts = [await _stream(options, port, 2) for _ in range(options.lone)]
    before, started = process.cpu_times(), time.perf_counter()
    await asyncio.gather(*(_stream(options, port, options.tokens) for _ in range(options.streams)))
    seconds, after = time.perf_counter() - started, process.cpu_times()
    total = options.streams * options.tokens
    spent = after.user + after.system - before.user - before.system
    median, late = percentile(firsts, 50), percentile(firsts, 99)
    assert median is not None and late is not None
    return {
        "route": options.route,
        "streams": options.streams,
        "tokens": total,
        "tokens_per_s": round(total / seconds, 1),
        "server_cpu_us_per_token": round(spent / total * 1e6, 2),
        "ttft_p50_ms": round(median * 1e3, 3),
        "ttft_p99_ms": round(late * 1e3, 3),
    }


async def _stream(options: Options, port: int, tokens: int) -> float:
    """One request on a connection of its own. Returns the seconds from sending it to its first text."""
    path, body = _body(options, tokens)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    started = time.perf_counter()
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    first, seen, tail = 0.0, 0, b""
    while data := await reader.read(1 << 16):
        if not first and b"data: " in data:
            first = time.perf_counter() - started
        seen += data.count(b'"text"') + data.count(b'"content"')
        tail = (tail + data)[-200:]
    writer.close()
    if b"[DONE]" not in tail or seen < tokens // 2:
        raise RequestError(f"a stream broke off: {tail.decode(errors='replace')}", code="bench_failed")
    return first
