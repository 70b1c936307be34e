"""`trunkline bench serving`: a server under load, over HTTP, streaming.

Arrivals are open-loop (Poisson, at --request-rate): a slow server does not slow them down.
--max-concurrency bounds the requests in flight instead or besides. Any server with /v1/completions that
takes token ids will do.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, fields

from trunkline.bench.report import peak_rss_of_tree, random_prompts, rate, show, spread
from trunkline.bench.sse import HttpError, events, fetch
from trunkline.config.cli import help_text, parse, wants_help
from trunkline.config.flags import Args, again, flag, flags_of, spelling
from trunkline.types import RequestError

ABOUT = (
    "Send streaming completion requests of random tokens to a server and measure throughput and latencies. "
    "Without --url, a server is started with the flags given, and stopped afterwards."
)
START_TIMEOUT = 600.0  # seconds for a server to load


@dataclass(frozen=True, kw_only=True)
class Options(Args):
    url: str | None = flag(
        "text", "a running server, e.g. http://127.0.0.1:30000", metavar="URL", group="workload"
    )
    num_prompts: int = flag("int", "requests", default=64, low=1, group="workload")
    input_len: int = flag("int", "own tokens of each prompt", default=128, low=1, group="workload")
    output_len: int = flag("int", "tokens generated for each", default=64, low=1, group="workload")
    shared_prefix_len: int = flag(
        "int", "tokens that all prompts begin with", default=0, low=0, group="workload"
    )
    request_rate: float | None = flag(
        "float", "requests a second, Poisson. Default: all at once", low=1e-6, group="workload"
    )
    max_concurrency: int | None = flag("int", "most requests in flight", low=1, group="workload")
    vocabulary: int = flag("int", "token ids are drawn below this", default=512, low=2, group="workload")
    seed: int = flag("int", "of prompts and arrivals", default=0, low=0, group="workload")
    json: bool = flag("bool", "print one line of JSON", group="workload")
    log_level: str = again(Args, "log_level", "warning")


@dataclass
class Sample:
    """One request, in seconds since it was due."""

    ttft: float = 0.0
    total: float = 0.0
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


def run(words: list[str]) -> int:
    if wants_help(words):
        sys.stdout.write(help_text("trunkline bench serving [FLAGS]", ABOUT, Options))
        return 0
    options = parse(words, Options)
    result = asyncio.run(_run(options))
    show(result, as_json=options.json)
    return 1 if result["failed"] else 0


async def _run(options: Options) -> dict[str, object]:
    if options.url is not None:
        return await measure(options, options.url.rstrip("/"))
    async with started_server(options) as (url, pid, load_s):
        result = await measure(options, url)
        return {**result, "load_s": round(load_s, 3), "peak_rss_bytes": peak_rss_of_tree(pid)}


async def measure(options: Options, url: str) -> dict[str, object]:
    """Drive the load. Failed requests are counted, and the first failure is told."""
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    try:
        models = json.loads(await fetch(f"{url}/v1/models", headers))
    except (OSError, ValueError, EOFError) as error:
        raise RequestError(
            f"no answer from {url}/v1/models: {error}; is the server running?",
            code="no_server",
            param="--url",
        ) from None
    model = options.served_model_name or models["data"][0]["id"]
    prompts = random_prompts(
        options.num_prompts, options.input_len, options.shared_prefix_len, options.vocabulary, options.seed
    )
    due = arrivals(len(prompts), options.request_rate, options.seed)
    samples = [Sample() for _ in prompts]
    slots = asyncio.Semaphore(options.max_concurrency or len(prompts))
    start = time.perf_counter()

    async def one(index: int) -> None:
        await asyncio.sleep(start + due[index] - time.perf_counter())
        async with slots:
            await complete(
                url, model, prompts[index], options.output_len, headers, samples[index], start + due[index]
            )

    await asyncio.gather(*(one(index) for index in range(len(prompts))))
    return {
        "bench": "serving",
        "model": model,
        "load_s": None,
        **summary(samples, time.perf_counter() - start),
        "peak_rss_bytes": None,
        "num_prompts": options.num_prompts,
        "input_len": options.input_len,
        "output_len": options.output_len,
        "shared_prefix_len": options.shared_prefix_len,
        "request_rate": options.request_rate,
        "max_concurrency": options.max_concurrency,
    }


async def complete(
    url: str,
    model: str,
    prompt: list[int],
    output_len: int,
    headers: dict[str, str],
    sample: Sample,
    due: float,
) -> None:
    """One streaming request. What goes wrong is noted in the sample."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_len,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    last = 0.0
    try:
        async with aclosing(events(f"{url}/v1/completions", body, headers)) as stream:
            async for event in stream:
                now = time.perf_counter()
                if event.get("usage"):
                    usage = event["usage"]
                    sample.prompt_tokens = usage["prompt_tokens"]
                    sample.output_tokens = usage["completion_tokens"]
                    sample.cached_tokens = (usage.get("prompt_tokens_details") or {}).get(
                        "cached_tokens"
                    ) or 0
                if not event.get("choices"):
                    continue
                if last:
                    sample.gaps.append(now - last)
                else:
                    sample.ttft = now - due
                last = now
        sample.total = last - due
    except (HttpError, OSError, EOFError, ValueError) as error:
        sample.error = str(error) or type(error).__name__


def arrivals(count: int, per_second: float | None, seed: int) -> list[float]:
    """Seconds at which requests are due: a Poisson process, or all at zero."""
    draw, now, due = random.Random(seed), 0.0, []
    for _ in range(count):
        due.append(now)
        now += draw.expovariate(per_second) if per_second else 0.0
    return due


def summary(samples: Sequence[Sample], total: float) -> dict[str, object]:
    done = [sample for sample in samples if sample.error is None]
    output = sum(sample.output_tokens for sample in done)
    prompt = sum(sample.prompt_tokens for sample in done)
    tpot = [(s.total - s.ttft) / (s.output_tokens - 1) for s in done if s.output_tokens > 1]
    return {
        "completed": len(done),
        "failed": len(samples) - len(done),
        "first_error": next((sample.error for sample in samples if sample.error), None),
        "prompt_tokens": prompt,
        "cached_tokens": sum(sample.cached_tokens for sample in done),
        "output_tokens": output,
        "total_s": round(total, 4),
        "requests_per_s": rate(len(done), total),
        "prompt_tokens_per_s": rate(prompt, total),
        "output_tokens_per_s": rate(output, total),
        **spread("ttft", [sample.ttft for sample in done]),
        **spread("itl", [gap for sample in done for gap in sample.gaps]),
        **spread("tpot", tpot),
        **spread("e2e", [sample.total for sample in done]),
    }


@asynccontextmanager
async def started_server(options: Options) -> AsyncIterator[tuple[str, int, float]]:
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


def server_words(options: Options) -> list[str]:
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
    try:
        await fetch(f"{url}/health", {})
    except (OSError, EOFError, RequestError):
        return False
    return True
