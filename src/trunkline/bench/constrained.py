"""The part of `trunkline bench grammar` that runs an engine: constrained beside free output, and hostile
grammars beside streams.

Rounds alternate between what is compared, so that a machine that others use too skews the ratios little.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from statistics import median

import msgspec

from trunkline.bench.report import Number, percentile, random_prompts
from trunkline.config.flags import Args
from trunkline.config.resolve import load_config
from trunkline.engine.client import EngineClient
from trunkline.messages import AddRequest
from trunkline.types import GrammarKind, GrammarSpec, RequestError, SamplingParams

INPUT = 128

# A model without a notion of text has about 60 % of its tokens dictated; it goes on longer than the outputs.
FORCED = GrammarSpec(
    "json_schema",
    json.dumps(
        {
            "type": "array",
            "minItems": 40,
            "items": {
                "type": "object",
                "properties": {
                    "temperature_in_degrees": {"type": "integer", "minimum": -40, "maximum": 40},
                    "weather": {"type": "string", "minLength": 40, "maxLength": 80},
                    "direction_of_the_wind": {"enum": ["northern wind", "southern wind"]},
                },
                "required": [
                    "temperature_in_degrees",
                    "weather",
                    "direction_of_the_wind",
                ],
                "additionalProperties": False,
            },
        }
    ),
    ordered=True,
)
_PRODUCT: Sequence[object] = [{"anyOf": [{"maxLength": i}, {"minLength": i + 9}]} for i in range(40)]
_PATTERNS: Sequence[object] = [{"pattern": f"a.{{{i}}}b"} for i in range(10, 22)]
_MEGABYTE: Mapping[str, object] = {f"p{i}{'x' * 90}": {"maxLength": i} for i in range(9000)}
HOSTILE: tuple[tuple[GrammarKind, str], ...] = (
    ("json_schema", '{"properties":{"a":' * 2000 + "{}" + "}}" * 2000),
    ("json_schema", json.dumps({"allOf": _PRODUCT})),
    ("json_schema", json.dumps({"type": "string", "allOf": _PATTERNS})),
    ("json_schema", json.dumps({"properties": _MEGABYTE})),
    ("regex", "((((a{0,99}b){0,99}c){0,99}d){0,99}e){0,99}" * 30),
    ("regex", "(a|aa|aaa)*b[^x]{9999}(a?){3000}"),
    ("regex", "(" * 5000 + ")" * 5000),
    ("ebnf", "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1} r{i + 1}\n" for i in range(40)) + 'r40 ::= "a"'),
    ("ebnf", "root ::= " + " | ".join(f'"{i:06}"' for i in range(70_000))),
)


@asynccontextmanager
async def engine(model_path: str | None, *flags: str) -> AsyncGenerator[EngineClient, None]:
    """An engine in this process. `flags`: names of switches that are on."""
    switches = dict.fromkeys(flags, True)
    args = Args(model_path=model_path, max_total_tokens=8192, log_level="error", random_seed=0)
    client = await EngineClient.in_process(
        load_config(msgspec.convert({**vars(args), **switches}, Args)).config
    )
    try:
        yield client
    finally:
        await client.close()


async def compare(model_path: str | None, rounds: int, rows: int, tokens: int) -> dict[str, Number]:
    """Output tokens a second: free, constrained with every token sampled, with jump-forward."""
    rates: dict[str, list[float]] = {"free": [], "constrained": [], "jump": []}
    async with engine(model_path, "disable_jump_forward") as plain, engine(model_path) as jumping:
        for number in range(rounds + 1):  # the first warms up
            for at, (name, client) in enumerate((("free", plain), ("constrained", plain), ("jump", jumping))):
                grammar = None if name == "free" else FORCED
                # Prompts that no run before has left in a cache.
                prompts = _prompts(client, rows, number * len(rates) + at)
                started = time.perf_counter()
                runs = [
                    _gaps(client, ids, tokens if number else 4, grammar, f"{name}-{number}-{row}")
                    for row, ids in enumerate(prompts)
                ]
                await asyncio.gather(*runs)
                if number:
                    rates[name].append(rows * tokens / (time.perf_counter() - started))
        counters = (await jumping.stats()).counters
    ratios = {
        name: [a / b for a, b in zip(rates[name], rates["free"], strict=True)]
        for name in ("constrained", "jump")
    }
    return {
        "rows": rows,
        "output_tokens": tokens,
        **{f"{name}_tokens_per_s": round(median(values), 1) for name, values in rates.items()},
        **{f"{name}_over_free": round(median(values), 3) for name, values in ratios.items()},
        **{f"{name}_over_free_min": round(min(values), 3) for name, values in ratios.items()},
        **{f"{name}_over_free_max": round(max(values), 3) for name, values in ratios.items()},
        "forced_share": round(counters["forced_tokens"] / counters["generated_tokens"], 3),
    }


async def beside_hostile(model_path: str | None, rounds: int, rows: int, tokens: int) -> dict[str, Number]:
    """Gaps between the tokens of streams, alone and while one sender sends hostile grammars one after the
    other; and how long that sender waits for its answers."""
    gaps: dict[bool, list[float]] = {False: [], True: []}
    answers: list[float] = []
    refused = 0
    async with engine(model_path) as client:
        await _ask(client, ("regex", "a"), "first")  # what the first grammar loads is loaded
        for number in range(rounds + 1):  # the first warms up
            for hostile in (False, True):
                sender, answered = None, asyncio.Event()
                if hostile:
                    sender = asyncio.create_task(_send(client, f"{number}", answered))
                    await answered.wait()  # however short the streams are, they run beside the following ones
                prompts = _prompts(client, rows, 2 * number + hostile)
                found = await asyncio.gather(
                    *(
                        _gaps(client, ids, tokens if number else 4, None, f"{number}-{hostile}-{at}")
                        for at, ids in enumerate(prompts)
                    )
                )
                if sender is not None:
                    sender.cancel()
                    times, errors = await sender
                    answers += times
                    refused += errors
                if number:
                    gaps[hostile] += [gap for one in found for gap in one]
    p99 = {hostile: percentile(values, 99) or 0.0 for hostile, values in gaps.items()}
    return {
        "streams": rows,
        "hostile_answers": len(answers),
        "hostile_refused": refused,
        "hostile_answer_max_s": round(max(answers), 3) if answers else None,
        **{
            f"step_p{percent}_ms_{'beside_hostile' if hostile else 'alone'}": _ms(values, percent)
            for hostile, values in gaps.items()
            for percent in (50, 90, 99)
        },
        "step_p99_ratio": round(p99[True] / p99[False], 3),
    }


def _ms(values: Sequence[float], percent: float) -> Number:
    found = percentile(values, percent)
    return None if found is None else round(found * 1e3, 2)


def _prompts(client: EngineClient, count: int, seed: int) -> list[list[int]]:
    assert client.ready is not None
    return random_prompts(count, INPUT, 0, client.ready.vocab_size, seed)


async def _gaps(
    client: EngineClient, ids: list[int], tokens: int, grammar: GrammarSpec | None, rid: str
) -> list[float]:
    """Seconds between the tokens of one output."""
    params = SamplingParams(temperature=0.0, max_new_tokens=tokens, ignore_eos=True)
    request = AddRequest(rid=rid, token_ids=ids, params=params, grammar=grammar)
    found: list[float] = []
    last = None
    async with aclosing(client.stream(request)) as outputs:
        async for out in outputs:
            if out.finish is not None and out.finish.kind == "abort":
                raise RequestError(out.finish.message or "aborted", code=out.finish.code or "aborted")
            now = time.perf_counter()
            if last is not None:
                found.append(now - last)
            last = now
    return found


async def _send(client: EngineClient, name: str, answered: asyncio.Event) -> tuple[list[float], int]:
    """Hostile grammars until cancelled; sets `answered` after the first. Returns the times to the answers,
    and how many were refused."""
    times: list[float] = []
    refused = 0
    try:
        for number in range(1_000_000):
            kind, source = HOSTILE[number % len(HOSTILE)]
            started = time.perf_counter()
            # Never the same one twice: what is known to be bad costs nothing.
            refused += await _ask(client, (kind, source + " " * number), f"hostile-{name}-{number}")
            times.append(time.perf_counter() - started)
            answered.set()
    except asyncio.CancelledError:
        pass
    return times, refused


async def _ask(client: EngineClient, spec: tuple[GrammarKind, str], rid: str) -> bool:
    """Whether the grammar was refused."""
    params = SamplingParams(temperature=0.0, max_new_tokens=4)
    request = AddRequest(rid=rid, token_ids=[1, 2, 3], params=params, grammar=GrammarSpec(*spec))
    finish = None
    async with aclosing(client.stream(request)) as outputs:
        async for out in outputs:
            finish = out.finish
    return finish is not None and finish.kind == "abort"
