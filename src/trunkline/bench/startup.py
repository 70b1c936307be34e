"""`trunkline bench startup`: from the start of a server to its first token, and the memory it took."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from trunkline.bench.report import show
from trunkline.bench.server import START_TIMEOUT, free_port, server_words
from trunkline.config.cli import help_text, parse, wants_help
from trunkline.config.flags import Args, again, flag
from trunkline.config.resolve import Resolved, load_config
from trunkline.http import HttpClient
from trunkline.types import RequestError

ABOUT = (
    "Start `trunkline serve` with the flags given, send one request, stop; --runs times. The first "
    "run of several also reads the files into the system's cache and is left out. "
    "Memory is that of the engine's process."
)
_PROMPT, _OUTPUT = list(range(1, 9)), 2  # tokens


@dataclass(frozen=True, kw_only=True)
class Options(Args):
    runs: int = flag("int", "starts", default=4, low=1, group="workload")
    json: bool = flag("bool", "print one line of JSON", group="workload")
    log_level: str = again(Args, "log_level", "warning")


@dataclass(frozen=True)
class Start:
    """One start: seconds since the process was started, and the most memory that its engine had resident."""

    ready_s: float
    first_token_s: float
    peak_rss_bytes: int
    phases: dict[str, float]  # seconds, one after another


def phases_of(
    spawn_s: float, ready_s: float, first_token_s: float, info: Mapping[str, Any]
) -> dict[str, float]:
    """Seconds that each phase took, from the start of the server's process to the first token.

    `spawn_s`: until the engine's process was started; ready_s and first_token_s are counted from the start
    too. The engine says in `info` how long its imports (torch), opening and packing of weights, and the rest
    of making its core took. `rest_s` is the start of the interpreter in between, and opening the port.
    """
    loaded = {name: float(info[name]) for name in ("import_s", "map_s", "pack_s")}
    core = float(info["load_s"]) - loaded["map_s"] - loaded["pack_s"]
    parts = {"server_s": spawn_s, **loaded, "core_s": core}
    rest = ready_s - sum(parts.values())
    return {**parts, "rest_s": rest, "answer_s": first_token_s - ready_s}


def run(words: list[str]) -> int:
    if wants_help(words):
        sys.stdout.write(help_text("trunkline bench startup [FLAGS]", ABOUT, Options))
        return 0
    options = parse(words, Options)
    resolved = load_config(options)
    starts = [asyncio.run(measure(options)) for _ in range(options.runs)]
    show(report(resolved, starts[1:] or starts), as_json=options.json)
    return 0


def report(resolved: Resolved, starts: list[Start]) -> dict[str, object]:
    """Medians. `extra_bytes`: the peak over the weights and KV written, as the memory plan counts them."""
    plan, cache = resolved.memory, resolved.config.cache
    weights = plan.size_of("weights")
    kv = plan.size_of("KV pool") // cache.num_pages * -(-(len(_PROMPT) + _OUTPUT) // cache.page_size)
    peak = int(median(start.peak_rss_bytes for start in starts))
    return {
        "bench": "startup",
        "model": resolved.config.model.served_model_name,
        "ready_s": round(median(start.ready_s for start in starts), 3),
        "first_token_s": round(median(start.first_token_s for start in starts), 3),
        "peak_rss_bytes": peak,
        "weight_bytes": weights,
        "extra_bytes": peak - weights - kv,
        "phases": {
            name: round(median(start.phases[name] for start in starts), 3) for name in starts[0].phases
        },
        "runs": [(round(start.ready_s, 3), round(start.first_token_s, 3)) for start in starts],
    }


async def measure(options: Options) -> Start:
    """One start of a server on a free port. Raises RequestError when it ends instead."""
    port = free_port(options.host)
    command = [sys.executable, "-m", "trunkline.launch_server", *server_words(options), "--port", str(port)]
    began, started = time.time(), time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(server.stdout.readline), START_TIMEOUT)
        while line and "is ready" not in line:
            line = await asyncio.wait_for(asyncio.to_thread(server.stdout.readline), START_TIMEOUT)
        if not line:
            raise RequestError(f"the server ended with status {server.wait()}", code="server_ended")
        ready = time.perf_counter() - started
        await _first_token(options, port)
        first = time.perf_counter() - started
        import psutil  # type: ignore[import-untyped]

        (engine,) = psutil.Process(server.pid).children()
        info = (await _client(options, port).json("GET", "/server_info"))["ready"]["info"]
        phases = phases_of(engine.create_time() - began, ready, first, info)
        return Start(ready, first, _peak(engine.pid), phases)
    finally:
        server.terminate()
        server.communicate()


async def _first_token(options: Options, port: int) -> None:
    body = {"prompt": _PROMPT, "max_tokens": _OUTPUT, "temperature": 0, "ignore_eos": True, "stream": True}
    async with aclosing(_client(options, port).events("/v1/completions", body)) as stream:
        async for event in stream:
            if event["choices"]:
                return


def _client(options: Options, port: int) -> HttpClient:
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    return HttpClient(f"http://{options.host}:{port}", headers)


def _peak(pid: int) -> int:
    """VmHWM of a process."""
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert peak is not None
    return int(peak.group(1)) * 1024
