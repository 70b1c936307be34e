"""`trunkline bench scheduler`: what a step costs beside the model: scheduling, batch building, bookkeeping.

A real engine core decodes so many rows at once. The time that the model and the choice of tokens take is
taken off each step; what is left is the scheduler, building the batch, the sampler's columns, and what is
kept of the results.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from trunkline.bench.report import random_prompts, show
from trunkline.config.cli import help_text, parse, wants_help
from trunkline.config.flags import Args, again, flag
from trunkline.config.resolve import Resolved, load_config
from trunkline.messages import AddRequest
from trunkline.types import RequestError, SamplingParams

ABOUT = "Decode many rows in this process and tell what a step costs beside the model."


@dataclass(frozen=True, kw_only=True)
class Options(Args):
    rows: int = flag("int", "requests that decode at once", default=256, low=1, high=4096, group="workload")
    steps: int = flag("int", "steps to measure", default=20, low=1, group="workload")
    input_len: int = flag("int", "tokens of each prompt", default=16, low=1, group="workload")
    temperature: float = flag("float", "0: greedy", default=0.0, low=0.0, high=100.0, group="workload")
    json: bool = flag("bool", "print one line of JSON", group="workload")
    log_level: str = again(Args, "log_level", "error")


class Timed:
    """Passes everything on to `inner`, and adds up the time that calls of some of its methods take."""

    def __init__(self, inner: Any, *names: str) -> None:
        self._inner = inner
        self._names = names
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in self._names:
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return found(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        return call


def run(words: list[str]) -> int:
    if wants_help(words):
        hidden = ("host", "port", "api_key", "chat_template", "sampling_defaults", "served_model_name")
        sys.stdout.write(help_text("trunkline bench scheduler [FLAGS]", ABOUT, Options, hide=hidden))
        return 0
    options = parse(words, Options)
    resolved = load_config(sized(options))
    show(measure(options, resolved), as_json=options.json)
    return 0


def sized(options: Options) -> Options:
    """A row and a part of the KV pool for each request, unless flags say otherwise."""
    if options.max_running_requests is None:
        options = replace(options, max_running_requests=options.rows)
    if (options.max_total_tokens, options.kv_memory, options.mem_fraction_static) == (None, None, None):
        pages = options.rows * ((options.input_len + output_len(options)) // options.page_size + 2)
        options = replace(options, max_total_tokens=pages * options.page_size)
    if options.chunked_prefill_size is None and options.rows > 512:
        options = replace(options, chunked_prefill_size=options.rows)
    return options


def output_len(options: Options) -> int:
    """Enough for the first rows to decode still when the last begin: they share the steps' tokens."""
    return options.steps + 8 * (options.input_len + 1)


def measure(options: Options, resolved: Resolved) -> dict[str, object]:
    """Raises RequestError when not all rows can decode at once."""
    from trunkline.engine.process import build_core

    core, ready = build_core(resolved.config)
    worker: Any = core.worker
    model = worker.model = Timed(worker.model, "forward", "logits", "top")
    kernels = worker.kernels = Timed(worker.kernels, "choose")
    prompts = random_prompts(options.rows, options.input_len, 0, ready.vocab_size, 0)
    params = SamplingParams(
        temperature=options.temperature,
        max_new_tokens=output_len(options),
        ignore_eos=True,
        sampling_seed=1,
    )
    for index, prompt in enumerate(prompts):
        for reply in core.handle(AddRequest(rid=str(index), token_ids=prompt, params=params)):
            raise RequestError(f"request {index} was refused: {reply}", code="refused")
    begun: set[str] = set()
    while core.has_work and len(begun) < options.rows:
        begun |= {out.rid for out in core.step() if out.token_ids}
    spans = []
    for _ in range(options.steps):
        before, started = model.seconds + kernels.seconds, time.perf_counter()
        outputs = core.step()
        took = time.perf_counter() - started
        if len(outputs) != options.rows:
            raise RequestError(
                f"{len(outputs)} of {options.rows} rows decoded in a step: give more of "
                "--max-running-requests or --max-total-tokens",
                code="too_few_rows",
                param="--rows",
            )
        spans.append((took, model.seconds + kernels.seconds - before))
    step = median(took for took, _ in spans)
    beside = median(took - inside for took, inside in spans)
    return {
        "bench": "scheduler",
        "model": resolved.config.model.served_model_name,
        "dtype": resolved.config.model.dtype,
        "rows": options.rows,
        "steps": options.steps,
        "temperature": options.temperature,
        "step_ms": round(step * 1e3, 3),
        "beside_model_ms": round(beside * 1e3, 3),
        "share": round(beside / step, 4),
        "us_per_row": round(beside * 1e6 / options.rows, 2),
    }
