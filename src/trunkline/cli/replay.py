"""`trunkline replay FILE`: the requests of a dump once more, and what came out differently."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trunkline.config.cli import help_text, parse, wants_help
from trunkline.config.flags import Args, again, flag
from trunkline.http import EndpointError, HttpClient
from trunkline.types import RequestError

ABOUT = (
    "Send the requests of a dump again, with the same seeds, and compare status, token counts and outputs. "
    "Without --url a server is started with the engine's flags given here. A dump without prompts is "
    "replayed with random prompts of the same lengths through /generate: that shows crashes, not outputs. "
    "Exit status 1: something came out differently."
)
HELD = ("host", "port", "log_level")


@dataclass(frozen=True, kw_only=True)
class Options(Args):
    url: str | None = flag(
        "text", "a running server, e.g. http://127.0.0.1:30000", metavar="URL", group="replay"
    )
    key: str | None = flag("text", "API key of that server", group="replay")
    arrivals: str = flag(
        "text", "recorded: with the pauses of the dump; together: all at once; serial: one after the other",
        default="recorded", choices=("recorded", "together", "serial"), group="replay",
    )  # fmt: skip
    json: bool = flag("bool", "print a JSON object for each request", group="replay")
    log_level: str = again(Args, "log_level", "error")


@dataclass(frozen=True)
class Outcome:
    """What a request came to. `digests` and `tokens` have one entry for each completion."""

    status: int
    error: str | None
    tokens: list[int]
    digests: list[str]


def run(words: list[str]) -> int:
    if wants_help(words) or not words:
        sys.stdout.write(help_text("trunkline replay FILE [FLAGS]", ABOUT, Options, hide=HELD))
        return 0
    if words[0].startswith("--"):
        raise RequestError(
            "the first argument is the dump: trunkline replay FILE", code="unknown_flag", param=words[0]
        )
    options = parse(words[1:], Options)
    head, calls = read_dump(Path(words[0]))
    return asyncio.run(_replay(options, head, calls))


def read_dump(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Head and calls of a dump. Raises RequestError for a file that is none."""
    from trunkline.engine.dump import FORMAT  # not for the help: it loads the tokenizers

    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    except OSError as error:
        raise RequestError(
            f"{path} can't be read: {error.strerror}", code="file_not_found", param=str(path)
        ) from error
    except ValueError as error:
        raise RequestError(f"{path} is no dump: {error}", code="bad_dump", param=str(path)) from error
    if not lines or not isinstance(lines[0], dict) or lines[0].get("trunkline_dump") != FORMAT:
        raise RequestError(
            f"{path} is no dump of this version: its first line must have trunkline_dump: {FORMAT}",
            code="bad_dump",
            param=str(path),
        )
    return lines[0], lines[1:]


async def _replay(options: Options, head: Mapping[str, Any], calls: Sequence[Mapping[str, Any]]) -> int:
    async with AsyncExitStack() as stack:
        if options.url is not None:
            url = options.url
        else:
            from trunkline.bench.server import started_server

            url, _, _ = await stack.enter_async_context(started_server(options))
        headers = {} if options.key is None else {"Authorization": f"Bearer {options.key}"}
        started = time.monotonic()

        async def one(call: Mapping[str, Any]) -> Outcome:
            if options.arrivals == "recorded":
                due = started + call["received"] - calls[0]["received"]
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            return await send(url, headers, call, bool(head["prompts"]))

        if options.arrivals == "serial":
            outcomes = [await one(call) for call in calls]
        else:
            outcomes = list(await asyncio.gather(*map(one, calls)))
    return _report(options, head, calls, outcomes)


async def send(url: str, headers: Mapping[str, str], call: Mapping[str, Any], prompts: bool) -> Outcome:
    """One request, not streamed; the server then tells what came out (GET /effective_parameters)."""
    name = f"replay-{random.getrandbits(64):016x}"
    client = HttpClient(url, {**headers, "x-request-id": name}, tries=1)
    route, body = (call["route"], again_body(call)) if prompts else ("/generate", made_up_body(call))
    try:
        try:
            await client.json("POST", route, body)
        except EndpointError as error:
            return Outcome(error.status, error.code, [], [])
        report = await client.json("GET", f"/effective_parameters/{name}")
    except (OSError, EOFError) as error:
        return Outcome(0, f"{type(error).__name__}: {error}", [], [])
    except EndpointError as error:  # it answered, and died before it could be asked
        return Outcome(error.status, error.code, [], [])
    finally:
        client.close()
    ends = [end for prompt in report["prompts"] for end in prompt["completions"]]
    return Outcome(
        200, None, [end["completion_tokens"] for end in ends], [end["output_digest"] for end in ends]
    )


def again_body(call: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded body with the seed that was drawn for it. Streaming changes no output, so it is left out,
    and so is the id, which is unique."""
    dropped = ("rid", "stream", "stream_options")
    body: dict[str, Any] = {name: value for name, value in call["body"].items() if name not in dropped}
    seeds = [parameters.get("sampling_seed") for parameters in call["parameters"]]
    if len(seeds) == 1 and seeds[0] is not None:
        *outer, last = call["seed_field"].split(".")
        at = body
        for name in outer:
            at[name] = dict(at.get(name) or {})
            at = at[name]
        at.setdefault(last, seeds[0])
    elif call["seed_field"].startswith("sampling_params."):
        given = body.get("sampling_params") or {}
        each = given if isinstance(given, list) else [given] * len(seeds)
        body["sampling_params"] = [
            {"sampling_seed": seed, **(one or {})} for one, seed in zip(each, seeds, strict=True)
        ]
    return body


def made_up_body(call: Mapping[str, Any]) -> dict[str, Any]:
    """A /generate body with random prompts of the recorded lengths and the recorded parameters.

    Token ids are drawn below 256, which every vocabulary has.
    """
    draw = random.Random(call["rid"])
    prompts = [[draw.randrange(256) for _ in range(count)] for count in call["prompt_tokens"]]
    return {"input_ids": prompts, "sampling_params": list(call["parameters"])}


def difference(call: Mapping[str, Any], now: Outcome, prompts: bool) -> str | None:
    """In words, or None. What was still running when the dump was made has no result to compare."""
    if now.status == 0:
        return f"no answer: {now.error}"
    if call["state"] == "running":
        return None if now.status == 200 else f"was running; now status {now.status} ({now.error})"
    if call["status"] != now.status:
        return f"status {call['status']} ({call['error']}) then, {now.status} ({now.error}) now"
    tokens = [one["completion_tokens"] for one in call["completions"]]
    if prompts and now.status == 200 and tokens != now.tokens:
        return f"{tokens} output tokens then, {now.tokens} now"
    digests = [one["output_digest"] for one in call["completions"]]
    if prompts and now.status == 200 and digests != now.digests:
        return f"other output: digest {digests} then, {now.digests} now"
    return None


def _report(
    options: Options,
    head: Mapping[str, Any],
    calls: Sequence[Mapping[str, Any]],
    outcomes: Sequence[Outcome],
) -> int:
    prompts = bool(head["prompts"])
    found = [difference(call, now, prompts) for call, now in zip(calls, outcomes, strict=True)]
    for call, now, said in zip(calls, outcomes, found, strict=True):
        if options.json:
            line = {"rid": call["rid"], "state": call["state"], "status": now.status, "tokens": now.tokens}
            print(json.dumps({**line, "difference": said}))
        elif said is not None:
            print(f"{call['rid']} ({call['route']}): {said}")
    running, different = sum(call["state"] == "running" for call in calls), sum(map(bool, found))
    if not options.json:
        print(f"dumped because: {head['reason']}")
        print(
            f"{len(calls)} requests, {running} of them running at the dump; {different} came out differently"
        )
        if not prompts:
            print("prompts were not in the dump: random ones of the same lengths; outputs can't be compared")
    return 1 if different else 0
