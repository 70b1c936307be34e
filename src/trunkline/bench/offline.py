"""`trunkline bench offline`: an engine core in this process, fed token ids, greedy, fixed output lengths.

All requests are submitted at once. The text layer is left out: what is measured is scheduler and worker.
"""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from trunkline.bench.report import Number, peak_rss_bytes, random_prompts, rate, show, spread
from trunkline.config.cli import help_text, parse, wants_help
from trunkline.config.flags import Args, again, flag, flags_of
from trunkline.config.resolve import Resolved, load_config
from trunkline.messages import AddRequest, Stats, TokensOut
from trunkline.types import GrammarSpec, RequestError, SamplingParams

if TYPE_CHECKING:
    from trunkline.engine.client import EngineClient

ABOUT = (
    "Run requests of random tokens through an engine in this process. Prefill rate: prompt tokens that were "
    "computed, over the time to the last first token. Decode rate: output tokens after that, over the rest. "
    "The KV pool holds the workload, unless a flag sizes it."
)


@dataclass(frozen=True, kw_only=True)
class Options(Args):
    num_prompts: int = flag("int", "requests, all at once", default=8, low=1, group="workload")
    input_len: int = flag("int", "own tokens of each prompt", default=128, low=1, group="workload")
    output_len: int = flag("int", "tokens generated for each", default=64, low=1, group="workload")
    shared_prefix_len: int = flag(
        "int", "tokens that all prompts begin with", default=0, low=0, group="workload"
    )
    seed: int = flag("int", "of the prompts", default=0, low=0, group="workload")
    warmup: int = flag("int", "requests run before, not counted", default=1, low=0, group="workload")
    json_schema: str | None = flag(
        "path", "file of a JSON schema that all outputs must match; they end where it lets them, or at "
        "--output-len", group="workload",
    )  # fmt: skip
    json: bool = flag("bool", "print one line of JSON", group="workload")
    log_level: str = again(Args, "log_level", "error")


@dataclass
class Timeline:
    """When the tokens of one request came, in seconds since all were submitted."""

    first: float = 0.0
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # (time, tokens)


def run(words: list[str]) -> int:
    if wants_help(words):
        server = (name for name, meta in flags_of(Args).items() if meta.group == "server")
        hidden = {*server, "served_model_name"} - {"log_level", "watchdog_timeout"}
        sys.stdout.write(help_text("trunkline bench offline [FLAGS]", ABOUT, Options, hide=hidden))
        return 0
    options = parse(words, Options)
    started = time.perf_counter()
    resolved = load_config(with_pool(options))
    if not options.json:
        print(resolved.memory.table(), file=sys.stderr)
    show(asyncio.run(measure(options, resolved, started)), as_json=options.json)
    return 0


def with_pool(options: Options) -> Options:
    """Size the KV pool for all requests at once and a page of slack for each, if no flag sizes it."""
    if (options.max_total_tokens, options.kv_memory, options.mem_fraction_static) != (None, None, None):
        return options
    longest = options.shared_prefix_len + options.input_len + options.output_len
    pages = options.num_prompts * (longest // options.page_size + 2)
    return replace(options, max_total_tokens=pages * options.page_size)


async def measure(options: Options, resolved: Resolved, started: float) -> dict[str, object]:
    """Load, run, count. Raises RequestError when a request cannot run or ends early."""
    from trunkline.engine.client import EngineClient
    from trunkline.kernels.pages import wait_until_populated

    config = resolved.config
    client = await EngineClient.in_process(config)
    try:
        assert client.ready is not None
        load_s = time.perf_counter() - started
        prompts = random_prompts(
            options.num_prompts,
            options.input_len,
            options.shared_prefix_len,
            client.ready.vocab_size,
            options.seed,
        )
        await warm_up(client, options.warmup, len(prompts[0]), grammar_of(options))
        await asyncio.to_thread(wait_until_populated)  # as a server's pool is seconds after its start
        before = await client.stats()
        lines, total = await run_all(client, prompts, options)
        after = await client.stats()
    finally:
        await client.close()
    return {
        "bench": "offline",
        "model": config.model.served_model_name,
        "device": config.model.device,
        "dtype": config.model.dtype,
        "load_s": round(load_s, 3),
        **counted(before, after),
        **timed(lines, total, sum(map(len, prompts)) - _grew(before, after, "cached_tokens")),
        "peak_rss_bytes": peak_rss_bytes(),
        "num_prompts": options.num_prompts,
        "input_len": options.input_len,
        "output_len": options.output_len,
        "shared_prefix_len": options.shared_prefix_len,
        "json_schema": options.json_schema,
        "config": msgspec.to_builtins(config),
    }


def grammar_of(options: Options) -> GrammarSpec | None:
    if options.json_schema is None:
        return None
    return GrammarSpec("json_schema", Path(options.json_schema).read_text("utf-8"), ordered=True)


async def warm_up(client: EngineClient, count: int, length: int, grammar: GrammarSpec | None) -> None:
    """A few requests of the workload's length, then an empty cache: first calls set up libraries, touch
    memory that later ones find in place, and compile the grammar."""
    params = SamplingParams(temperature=0.0, max_new_tokens=2, ignore_eos=True)
    for i in range(count):
        request = AddRequest(rid=f"warm-{i}", token_ids=[1] * length, params=params, grammar=grammar)
        async for out in client.stream(request):
            _raise_if_aborted(out)
    await client.flush_cache()


async def run_all(
    client: EngineClient, prompts: list[list[int]], options: Options
) -> tuple[list[Timeline], float]:
    """All requests at once. Returns their timelines and the seconds until the last token."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    params = SamplingParams(temperature=0.0, max_new_tokens=options.output_len, ignore_eos=True)
    grammar = grammar_of(options)
    lines = [Timeline() for _ in prompts]
    with tqdm(total=len(prompts) * options.output_len, unit="tok", disable=options.json or None) as bar:
        start = time.perf_counter()

        async def one(index: int) -> None:
            request = AddRequest(
                rid=f"bench-{index}", token_ids=prompts[index], params=params, grammar=grammar
            )
            async with aclosing(client.stream(request)) as outputs:
                async for out in outputs:
                    _raise_if_aborted(out)
                    if out.token_ids:
                        _note(lines[index], time.perf_counter() - start, len(out.token_ids))
                        bar.update(len(out.token_ids))

        await asyncio.gather(*(one(index) for index in range(len(prompts))))
        return lines, time.perf_counter() - start


def _raise_if_aborted(out: TokensOut) -> None:
    if out.finish is not None and out.finish.kind == "abort":
        raise RequestError(out.finish.message or "aborted", code=out.finish.code or "aborted")


def counted(before: Stats, after: Stats) -> dict[str, Number]:
    """What the engine's own counters say: hardware-independent."""
    names = ("steps", "prompt_tokens", "cached_tokens", "computed_tokens", "retractions", "forced_tokens")
    found: dict[str, Number] = {name: _grew(before, after, name) for name in names}
    return found | {"output_tokens": _grew(before, after, "generated_tokens")}


def timed(lines: list[Timeline], total: float, computed_prompt: int) -> dict[str, Number]:
    """Rates and latencies. `computed_prompt`: prompt tokens that did not come from the cache."""
    split = max(line.first for line in lines)
    produced = sum(tokens for line in lines for _, tokens in line.arrivals)
    decoded = sum(tokens for line in lines for at, tokens in line.arrivals if at > split)
    return {
        "total_s": round(total, 4),
        "prefill_tokens_per_s": rate(computed_prompt, split),
        "decode_tokens_per_s": rate(decoded, total - split),
        "output_tokens_per_s": rate(produced, total),
        **spread("ttft", [line.first for line in lines]),
        **spread("itl", [gap for line in lines for gap in line.gaps]),
    }


def _note(line: Timeline, now: float, tokens: int) -> None:
    if line.arrivals:
        line.gaps.append(now - line.last)
    else:
        line.first = now
    line.last = now
    line.arrivals.append((now, tokens))


def _grew(before: Stats, after: Stats, name: str) -> int:
    return int(after.counters.get(name, 0) - before.counters.get(name, 0))
