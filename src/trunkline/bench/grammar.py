"""`trunkline bench grammar`: compile times and masks of some constraints, with a model's vocabulary.

A text that matches is stepped token by token. What counts is a request's share of each step: `mask` fills a
row, `accept` takes a token, `forced` looks for text that needs no step. `rowsN` fills the masks of a
step with N rows of the constraint, `oneN` the same in one thread. The first walk warms up, uncounted.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trunkline.bench.constrained import beside_hostile, compare
from trunkline.bench.report import Number, percentile
from trunkline.config.cli import help_text, parse, wants_help
from trunkline.config.flags import flag
from trunkline.config.resolve import SEEDLING
from trunkline.engine.guidance import fill_masks
from trunkline.grammar.backend import Backend, make_backend
from trunkline.grammar.protocol import Grammar, GrammarKind, GrammarSpec
from trunkline.scheduler.guide import Guide
from trunkline.text.tokenizer import Tokenizer
from trunkline.types import RequestError

ABOUT = "Measure how long grammars take to compile and masks to fill, for one row and for many."
SCHEMA = """{
"type": "object", "required": ["name", "age", "address"], "properties": {
    "name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
    "email": {"type": "string", "format": "email"},
    "tags": {"type": "array", "items": {"type": "string", "maxLength": 40}},
    "address": {"type": "object", "required": ["zip"], "properties": {
        "street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}}}}}"""
VALUE = (
    '{"name": "Maria Gonzales", "age": 42, "email": "maria@example.com", "tags": ["new", "a big one"], '
    '"address": {"street": "12 Long Street, Building 4", "zip": "12345"}}'
)
BATCHES = 1, 8, 32
CONSTRAINTS: tuple[tuple[str, GrammarKind, str, str], ...] = (
    ("json_schema", "json_schema", SCHEMA, VALUE),
    ("json_object", "json_object", "", VALUE),
    (
        "regex",
        "regex",
        "[A-Z][a-z]+ (was|is) [0-9]+ years old\\.( .*)?",
        "Maria is 42 years old. So it goes.",
    ),
    ("ebnf", "ebnf", 'root ::= t ("+" t)*\nt ::= [0-9]+ | "(" root ")" | [a-z]+', "(abc+123)+(x+(y+12345))"),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    model_path: str | None = flag("text", "a folder with a tokenizer. Default: the bundled model's")
    repeat: int = flag("int", "walks over each text", default=5, low=1, high=1000)
    backend: str = flag(
        "text", "whose masks to measure", default="llguidance", choices=("llguidance", "xgrammar")
    )
    throughput: bool = flag(
        "bool", "also run engines: constrained output, with and without jump-forward, over free output"
    )
    hostile: bool = flag("bool", "also run an engine: streams alone, and beside hostile grammars")
    rounds: int = flag("int", "rounds of the runs with engines", default=3, low=1, high=100)
    rows: int = flag("int", "requests at once, in the runs with engines", default=8, low=1, high=30)
    tokens: int = flag(
        "int", "output tokens of each, in the runs with engines", default=128, low=8, high=1024
    )
    json: bool = flag("bool", "print one line of JSON")


def run(words: list[str]) -> int:
    if wants_help(words):
        sys.stdout.write(help_text("trunkline bench grammar [FLAGS]", ABOUT, Options))
        return 0
    options = parse(words, Options)
    tokenizer = Tokenizer.load(Path(options.model_path) if options.model_path else SEEDLING)
    if not tokenizer.special_ids:
        raise RequestError(
            "the tokenizer has no special token to end with", code="no_eos", param="model_path"
        )
    started = time.perf_counter()
    backend = make_backend(options.backend, tokenizer, [max(tokenizer.special_ids)])
    result: dict[str, object] = {
        "vocabulary": tokenizer.num_tokens,
        "trie_s": round(time.perf_counter() - started, 2),
    }
    rows = [measure(backend, tokenizer, *one, options.repeat) for one in CONSTRAINTS]
    sizes = options.model_path, options.rounds, options.rows, options.tokens
    runs: dict[str, Coroutine[Any, Any, dict[str, Number]]] = {}
    if options.throughput:
        runs["throughput"] = compare(*sizes)
    if options.hostile:
        runs["hostile"] = beside_hostile(*sizes)
    found = {name: asyncio.run(run) for name, run in runs.items()}
    if options.json:
        print(json.dumps(result | {"constraints": rows} | found))
        return 0
    print(f"{result['vocabulary']} tokens, trie in {result['trie_s']} s; microseconds a token")
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    for name, values in found.items():
        print(f"{name}:", "  ".join(f"{key} {value}" for key, value in values.items()))
    return 0


def measure(
    backend: Backend,
    tokenizer: Tokenizer,
    name: str,
    kind: GrammarKind,
    source: str,
    text: str,
    repeat: int,
) -> dict[str, str | float | None]:
    """One row of the result: `compile_ms`, and percentiles in microseconds."""
    started = time.perf_counter()
    grammar = backend.compile(GrammarSpec(kind, source))
    found: dict[str, str | float | None] = {"name": name}
    found["compile_ms"] = round((time.perf_counter() - started) * 1e3, 1)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    mask = np.zeros((tokenizer.num_tokens + 31) // 32, np.int32)
    spans: dict[str, list[float]] = {"mask": [], "accept": [], "forced": []}
    for walk in range(repeat + 1):
        matcher = grammar.matcher()
        for token in tokens:
            marks = [time.perf_counter()]
            matcher.fill_mask(mask)
            marks.append(time.perf_counter())
            matcher.forced()
            marks.append(time.perf_counter())
            taken = matcher.accept(token)
            marks.append(time.perf_counter())
            if not taken:
                raise RequestError(f"{name} does not accept its own text", code="bench_failed")
            for index, what in enumerate(("mask", "forced", "accept")):
                if walk:
                    spans[what].append(marks[index + 1] - marks[index])
    for what, percents in (("mask", (50, 90, 99)), ("accept", (50,)), ("forced", (50, 99))):
        for percent in percents:
            at = percentile(spans[what], percent)
            found[f"{what}_p{percent}"] = _microseconds(at)
    for rows in BATCHES:
        for prefix, fill in (("one", _fill_alone), ("rows", fill_masks)):
            walks = [_walk_batch(grammar, tokens, (rows, len(mask)), fill) for _ in range(repeat + 1)]
            found[f"{prefix}{rows}_p50"] = _microseconds(percentile(list(chain(*walks[1:])), 50))
    return found


def _microseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e6, 1)


Row = tuple[Guide, frozenset[int]]


def _fill_alone(rows: Sequence[Row], words: npt.NDArray[np.int32]) -> None:
    for (guide, banned), mask in zip(rows, words, strict=True):
        guide.fill_mask(mask, banned)


def _walk_batch(
    grammar: Grammar,
    tokens: list[int],
    shape: tuple[int, int],
    fill: Callable[[Sequence[Row], npt.NDArray[np.int32]], object],
) -> list[float]:
    """Seconds for the masks of each step; `shape`: rows, words of a mask."""
    rows = [(Guide(grammar.matcher(), ()), frozenset[int]()) for _ in range(shape[0])]
    words = np.zeros(shape, np.int32)
    spans = []
    for token in tokens:
        begun = time.perf_counter()
        fill(rows, words)
        spans.append(time.perf_counter() - begun)
        for guide, _ in rows:
            guide.follow([token])
    return spans
