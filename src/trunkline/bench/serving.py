"""`trunkline bench serving`: a server under load, over HTTP, streaming.

Arrivals are open-loop: a slow server does not slow them down, and latencies count from when a request was
due.
--max-concurrency bounds the requests in flight instead or besides.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
from tqdm import tqdm  # type: ignore[import-untyped]

from trunkline.bench.client import Job, Sample, drive
from trunkline.bench.datasets import FILES, GENERATED, Session, Shape, arrivals, with_arrivals
from trunkline.bench.dialects import DIALECTS
from trunkline.bench.report import peak_rss_of_tree, rate, show, spread
from trunkline.bench.server import started_server
from trunkline.config.cli import help_text, parse, wants_help
from trunkline.config.flags import Args, again, flag
from trunkline.http import HttpClient
from trunkline.types import RequestError

ABOUT = (
    "Send streaming requests to a server and measure throughput and latencies, which count from when a "
    "request was due. Without --url, a server is started with the flags given, and stopped afterwards."
)
LEAD = 0.25  # seconds between the signal to start and the start itself, for clients in other processes
_PREFIX: Mapping[str, int] = MappingProxyType(
    {"shared-prefix": 1024, "agentic": 2048}
)  # tokens, where --shared-prefix-len says nothing
_GOALS = ("ttft", "tpot", "e2e")


@dataclass(frozen=True, kw_only=True)
class Options(Args):
    url: str | None = flag(
        "text",
        "a running server, e.g. http://127.0.0.1:30000",
        metavar="URL",
        aliases=("--base-url",),
        group="workload",
    )
    backend: str = flag(
        "text",
        "the interface to use: native /generate (trunkline, sglang), /v1/completions, /v1/chat/completions",
        default="openai",
        choices=tuple(DIALECTS),
        group="workload",
    )
    dataset: str = flag(
        "text",
        "random: single requests; shared-prefix: the same, in groups with a long prefix; multi-turn: chats; "
        "agentic: steps of agents over a common prompt; custom: JSON lines with prompt or messages; "
        "trace: JSON lines in the form of Mooncake's traces",
        default="random",
        choices=(*GENERATED, *FILES),
        aliases=("--dataset-name",),
        group="workload",
    )
    dataset_path: str | None = flag(
        "text", "file of a custom dataset or trace", metavar="FILE", group="workload"
    )
    num_prompts: int = flag("int", "sessions; a single request is one", default=64, low=1, group="workload")
    input_len: int = flag(
        "int",
        "most own tokens of each turn",
        default=128,
        low=1,
        aliases=("--random-input-len",),
        group="workload",
    )
    output_len: int = flag(
        "int",
        "most tokens generated for each",
        default=64,
        low=1,
        aliases=("--random-output-len",),
        group="workload",
    )
    range_ratio: float = flag(
        "float",
        "lengths are uniform between this part of the most and the most",
        default=1.0,
        low=0.0,
        high=1.0,
        aliases=("--random-range-ratio",),
        group="workload",
    )
    shared_prefix_len: int | None = flag(
        "int",
        "tokens that the sessions of a group begin with. Default: 0; shared-prefix 1024, agentic 2048",
        low=0,
        group="workload",
    )
    num_groups: int = flag("int", "different prefixes", default=1, low=1, group="workload")
    turns: int = flag(
        "int", "of a multi-turn session; on average of an agent", default=4, low=1, group="workload"
    )
    think_time: float = flag(
        "float", "mean seconds between an answer and the next turn", default=0.0, low=0.0, group="workload"
    )
    arrival: str = flag(
        "text",
        "when sessions begin: poisson, constant, burst (groups of --burst-size), all at --request-rate, or "
        "trace: the file's own times",
        default="poisson",
        choices=("poisson", "constant", "burst", "trace"),
        group="workload",
    )
    request_rate: float | None = flag(
        "float", "sessions a second. Default: all at once", low=1e-6, group="workload"
    )
    burst_size: int = flag("int", "sessions of a burst", default=8, low=1, group="workload")
    trace_speed: float = flag(
        "float",
        "how many times faster than in the file sessions begin",
        default=1.0,
        low=1e-6,
        group="workload",
    )
    max_concurrency: int | None = flag("int", "most requests in flight", low=1, group="workload")
    processes: int = flag(
        "int",
        "client processes; one keeps up with some 10,000 events a second",
        default=1,
        low=1,
        group="workload",
    )
    warmup_requests: int = flag(
        "int", "requests before the clock starts, of other tokens", default=1, low=0, group="workload"
    )
    flush_cache: bool = flag(
        "bool", "flush the server's prefix cache before the clock starts", group="workload"
    )
    extra_request_body: str | None = flag(
        "text", "JSON object that goes into every request", metavar="JSON", group="workload"
    )
    goodput: str | None = flag(
        "text",
        "limits in ms, e.g. ttft:500,tpot:50,e2e:5000: how many requests a second meet all of them",
        metavar="LIMITS",
        group="workload",
    )
    vocabulary: int = flag("int", "token ids are drawn below this", default=512, low=2, group="workload")
    seed: int = flag("int", "of prompts and arrivals", default=0, low=0, group="workload")
    json: bool = flag("bool", "print one line of JSON", group="workload")
    output_file: str | None = flag(
        "text", "file to append a line of JSON to for each request", metavar="FILE", group="workload"
    )
    plot: str | None = flag(
        "text",
        "picture of latencies and throughput to write (.png or .svg)",
        metavar="FILE",
        group="workload",
    )
    log_level: str = again(Args, "log_level", "warning")


def run(words: list[str]) -> int:
    if wants_help(words):
        sys.stdout.write(help_text("trunkline bench serving [FLAGS]", ABOUT, Options))
        return 0
    options = parse(words, Options)
    sessions, goals = (
        load_sessions(options),
        read_goals(options.goodput),
    )  # what is wrong is told before a server starts
    read_extra(options)
    if options.plot:
        from trunkline.bench.plot import require

        require(options.plot)
    result, samples = asyncio.run(_run(options, sessions, goals))
    show(result, as_json=options.json)
    if options.output_file:
        with open(options.output_file, "ab") as file:
            file.writelines(msgspec.json.encode(sample) + b"\n" for sample in samples)
    if options.plot:
        from trunkline.bench.plot import draw

        draw(samples, Path(options.plot))
    return 1 if result["failed"] else 0


# ---------------------------------------------------------------------- what to send
def load_sessions(options: Options) -> list[Session]:
    """The sessions with their times. Raises RequestError for flags that don't go together and bad files."""
    prefix = (
        _PREFIX.get(options.dataset, 0) if options.shared_prefix_len is None else options.shared_prefix_len
    )
    shape = Shape(
        count=options.num_prompts,
        input_len=options.input_len,
        output_len=options.output_len,
        range_ratio=options.range_ratio,
        groups=options.num_groups,
        prefix_len=prefix,
        turns=options.turns if options.dataset in ("multi-turn", "agentic") else 1,
        pause=options.think_time,
        vocabulary=options.vocabulary,
        seed=options.seed,
    )
    from_file = options.dataset in FILES
    if from_file != (options.dataset_path is not None):
        what = "needs --dataset-path" if from_file else "is generated and takes no --dataset-path"
        raise RequestError(f"--dataset {options.dataset} {what}", code="invalid_flag", param="--dataset-path")
    if from_file:
        assert options.dataset_path is not None
        sessions = FILES[options.dataset](Path(options.dataset_path), shape)
        if not sessions:
            raise RequestError(
                f"{options.dataset_path} has no line", code="invalid_dataset", param="--dataset-path"
            )
    else:
        sessions = GENERATED[options.dataset](shape)
    if options.arrival == "trace":
        if not from_file:
            raise RequestError(
                "--arrival trace takes the times of a file: use it with --dataset custom or trace",
                code="invalid_flag",
                param="--arrival",
            )
        first = min(session.due for session in sessions)
        return with_arrivals(sessions, [(s.due - first) / options.trace_speed for s in sessions])
    if options.arrival != "poisson" and options.request_rate is None:
        raise RequestError(
            f"--arrival {options.arrival} needs --request-rate", code="invalid_flag", param="--request-rate"
        )
    burst = options.burst_size if options.arrival == "burst" else 1
    due = arrivals(len(sessions), options.request_rate, options.seed, kind=options.arrival, burst=burst)
    return with_arrivals(sessions, due)


def read_goals(text: str | None) -> dict[str, float]:
    """`ttft:500,tpot:50` -> seconds by name. Raises RequestError."""
    goals = {}
    for part in text.split(",") if text else ():
        name, _, limit = part.strip().partition(":")
        try:
            if name not in _GOALS or not float(limit) > 0:
                raise ValueError
        except ValueError:
            raise RequestError(
                f"--goodput: {part!r} is no limit: write e.g. ttft:500 (ms); names are {', '.join(_GOALS)}",
                code="invalid_flag",
                param="--goodput",
            ) from None
        goals[name] = float(limit) / 1000
    return goals


def read_extra(options: Options) -> dict[str, Any]:
    try:
        extra = json.loads(options.extra_request_body or "{}")
    except ValueError:
        extra = None
    if not isinstance(extra, dict):
        raise RequestError(
            "--extra-request-body must be a JSON object", code="invalid_flag", param="--extra-request-body"
        )
    return extra


# ---------------------------------------------------------------------- the run
async def _run(
    options: Options, sessions: Sequence[Session], goals: Mapping[str, float]
) -> tuple[dict[str, object], list[Sample]]:
    if options.url is not None:
        return await measure(options, sessions, goals, options.url.rstrip("/"))
    async with started_server(options) as (url, pid, load_s):
        result, samples = await measure(options, sessions, goals, url)
        return {**result, "load_s": round(load_s, 3), "peak_rss_bytes": peak_rss_of_tree(pid)}, samples


async def measure(
    options: Options, sessions: Sequence[Session], goals: Mapping[str, float], url: str
) -> tuple[dict[str, object], list[Sample]]:
    """Drive the load. Failed requests are counted, and the first failure is told."""
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    client = HttpClient(url, headers)
    try:
        models = await client.json("GET", "/v1/models")
        model = options.served_model_name or models["data"][0]["id"]
        job = Job(
            url=url,
            headers=headers,
            dialect=options.backend,
            model=model,
            sessions=list(sessions),
            slots=options.max_concurrency or 2**31,
            extra=read_extra(options),
        )
        await _warm_up(job, options)
        if options.flush_cache:
            await client.json("POST", "/flush_cache")
    except (OSError, EOFError, TypeError, LookupError, RequestError) as error:
        raise RequestError(
            f"no answer from {url}: {error}; is the server running?", code="no_server", param="--url"
        ) from None
    finally:
        client.close()
    samples: list[Sample] = []
    turns = sum(len(session.turns) for session in sessions)
    with tqdm(total=turns, unit="request", disable=None, leave=False) as bar:

        def done(sample: Sample) -> None:
            samples.append(sample)
            bar.update()

        total = await (_spread(job, options.processes, done) if options.processes > 1 else _alone(job, done))
    samples.sort(key=lambda sample: sample.due)
    return {
        "bench": "serving",
        "model": model,
        "load_s": None,
        **summary(samples, total, goals),
        "peak_rss_bytes": None,
        **{name: getattr(options, name) for name in _TOLD},
    }, samples


_TOLD = (
    "backend", "dataset", "dataset_path", "num_prompts", "input_len", "output_len", "range_ratio",
    "shared_prefix_len", "num_groups", "turns", "think_time", "arrival", "request_rate", "max_concurrency",
    "processes", "goodput", "seed",
)  # fmt: skip


async def _warm_up(job: Job, options: Options) -> None:
    shape = Shape(
        count=options.warmup_requests,
        input_len=options.input_len,
        output_len=8,
        vocabulary=options.vocabulary,
        seed=options.seed + 1,
    )
    failed: list[Sample] = []
    warm = msgspec.structs.replace(job, sessions=GENERATED["random"](shape), slots=1)
    await drive(warm, time.perf_counter(), lambda sample: failed.append(sample) if sample.error else None)
    if failed:
        raise RequestError(failed[0].error or "", code="warmup_failed")


async def _alone(job: Job, done: Callable[[Sample], None]) -> float:
    start = time.perf_counter()
    await drive(job, start, done)
    return time.perf_counter() - start


async def _spread(job: Job, processes: int, done: Callable[[Sample], None]) -> float:
    """The sessions dealt out to client processes, which start at the same time."""
    count = min(processes, len(job.sessions), job.slots)
    clients = []
    try:
        for k in range(count):
            slots = (job.slots + count - 1 - k) // count
            part = msgspec.structs.replace(job, sessions=job.sessions[k::count], slots=slots)
            client = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "trunkline.bench.client",
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=2**26,
            )  # fmt: skip
            clients.append(client)
            assert client.stdin is not None
            client.stdin.write(msgspec.json.encode(part) + b"\n")
        for client in clients:
            assert client.stdout is not None
            await client.stdout.readline()
        start = time.perf_counter() + LEAD
        for client in clients:
            assert client.stdin is not None
            client.stdin.write(b"%r\n" % start)
        await asyncio.gather(*(_collect(client, done) for client in clients))
        return time.perf_counter() - start
    finally:
        for client in clients:
            if client.returncode is None:
                client.kill()
                await client.wait()


async def _collect(client: asyncio.subprocess.Process, done: Callable[[Sample], None]) -> None:
    assert client.stdout is not None
    async for line in client.stdout:
        done(msgspec.json.decode(line, type=Sample))
    if await client.wait():
        raise RequestError(f"a client process ended with status {client.returncode}", code="client_failed")


# ---------------------------------------------------------------------- what came out
def summary(samples: Sequence[Sample], total: float, goals: Mapping[str, float]) -> dict[str, object]:
    done = [sample for sample in samples if sample.error is None]
    failed = [sample for sample in samples if sample.error is not None]
    output = sum(sample.output_tokens for sample in done)
    prompt = sum(sample.prompt_tokens for sample in done)
    good = sum(_meets(sample, goals) for sample in done)
    return {
        "completed": len(done),
        "failed": len(failed),
        "first_error": failed[0].error if failed else None,
        "errors": dict(Counter(sample.code for sample in failed)),
        "prompt_tokens": prompt,
        "cached_tokens": sum(sample.cached_tokens for sample in done),
        "output_tokens": output,
        "total_s": round(total, 4),
        "requests_per_s": rate(len(done), total),
        "prompt_tokens_per_s": rate(prompt, total),
        "output_tokens_per_s": rate(output, total),
        "mean_concurrency": rate(sum(sample.total for sample in done), total),
        "goodput_requests_per_s": rate(good, total) if goals else None,
        "goodput_share": round(good / len(samples), 4) if goals and samples else None,
        **spread("ttft", [sample.ttft for sample in done]),
        **spread("itl", [gap for sample in done for gap in sample.gaps]),
        **spread("tpot", [sample.tpot for sample in done if sample.tpot is not None]),
        **spread("e2e", [sample.total for sample in done]),
    }


def _meets(sample: Sample, goals: Mapping[str, float]) -> bool:
    reached = {"ttft": sample.ttft, "tpot": sample.tpot or 0.0, "e2e": sample.total}
    return all(reached[name] <= limit for name, limit in goals.items())
