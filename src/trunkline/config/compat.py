"""The capability table as data (P18): one source for the docs, the start-up check and the matrix of tests.

Every built feature works with every other one. What is listed as an exclusion is impossible by nature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from trunkline.config.schema import EngineConfig
from trunkline.types import RequestError

AxisValue = str | int | bool


@dataclass(frozen=True)
class Feature:
    """One capability: how it is chosen, and the values under which outputs must be bit-equal.

    `axis` names the knob of the metamorphic matrix, `values` its settings there; both are empty for what
    a request chooses by itself or what changes outputs by design.
    """

    area: str
    name: str
    how: str
    status: Literal["built", "planned"] = "built"
    axis: str = ""
    values: tuple[AxisValue, ...] = ()
    rounds: bool = False  # its settings change outputs by design: bit-equality holds for each by itself


@dataclass(frozen=True)
class Exclusion:
    """Two settings that cannot be had together, why by nature, and whether a configuration has both."""

    name: str
    why: str
    clash: Callable[[EngineConfig], bool]


FEATURES: tuple[Feature, ...] = (
    Feature("cache", "prefix cache", "on; --disable-radix-cache", axis="prefix_cache", values=(True, False)),
    Feature("cache", "pages of any size", "--page-size", axis="page_size", values=(1, 4, 16)),
    Feature(
        "cache",
        "keys and values in bfloat16 or int8",
        "--kv-cache-dtype",
        axis="kv_cache_dtype",
        values=("auto", "bfloat16", "int8"),
        rounds=True,
    ),
    Feature("cache", "cache namespaces", "cache_salt, --weight-version"),
    Feature("cache", "sessions: requests that go on from stored tokens", "/open_session, session_params"),
    Feature("cache", "waiting for a prefix in flight", "on with the prefix cache"),
    Feature(
        "scheduling", "chunked prefill", "--chunked-prefill-size", axis="step_tokens", values=(8, 24, 512)
    ),
    Feature("scheduling", "mixed steps", "--mix", axis="mix", values=("always", "never")),
    Feature("scheduling", "overlap of steps", "--overlap-depth", axis="depth", values=(0, 1, 2)),
    Feature(
        "scheduling", "continuous batching", "always", axis="batch", values=("alone", "together", "staggered")
    ),
    Feature("scheduling", "preemption", "when the pool is full", axis="pool", values=("ample", "tight")),
    Feature("scheduling", "policies", "--schedule-policy", axis="policy", values=("fcfs", "lpm")),
    Feature("scheduling", "priorities", "priority, --enable-priority-scheduling"),
    Feature(
        "scheduling",
        "deadlines of waiting and running",
        "--request-waiting-timeout, --request-running-timeout",
    ),
    Feature("scheduling", "pauses", "/pause_generation, /continue_generation"),
    Feature("scheduling", "abort in every phase", "disconnect, /abort_request"),
    Feature("request", "streaming", "stream"),
    Feature("request", "log-probabilities of outputs", "logprobs"),
    Feature("request", "log-probabilities of the prompt", "logprob_start_len, echo"),
    Feature("request", "embeddings: last token or mean", "/v1/embeddings, /encode, --pooling"),
    Feature("request", "scores of label tokens, reranking", "/v1/score, /v1/rerank"),
    Feature("request", "responses: stored, continued, in the background", "/v1/responses"),
    Feature("request", "batches of requests in files, durable", "/v1/files, /v1/batches"),
    Feature("request", "several completions", "n"),
    Feature("request", "seeded sampling", "seed"),
    Feature("request", "temperature, top-p, top-k, min-p", "sampling parameters"),
    Feature("request", "penalties and logit bias", "sampling parameters"),
    Feature("request", "stop strings, regexes and tokens", "stop, stop_regex, stop_token_ids"),
    Feature(
        "request",
        "structured output: JSON schema, any JSON, regex, EBNF, structural tags",
        "response_format, json_schema, regex, ebnf, structural_tag",
    ),
    Feature(
        "request",
        "forced tokens without steps",
        "on; --disable-jump-forward",
        axis="jump_forward",
        values=(True, False),
    ),
    Feature("request", "bounded reasoning before a grammar", "max_thinking_tokens"),
    Feature("request", "which tokens a grammar dictated", "return_forced; with logprobs in a chat"),
    Feature("request", "reasoning apart from the answer", "--reasoning-parser, separate_reasoning"),
    Feature("request", "tool calls in the 17 formats of model families", "--tool-call-parser, tools"),
    Feature(
        "request",
        "interfaces of OpenAI, Anthropic and Ollama",
        "/v1/chat/completions, /v1/messages, /api/chat",
    ),
    Feature(
        "request",
        "calls enforced by a grammar",
        "tool_choice required, named or allowed_tools; strict; parallel_tool_calls",
    ),
    Feature("server", "effective parameters asked back", "GET /effective_parameters/{rid}"),
    Feature("server", "prefix-miss reports", "return_prefix_miss"),
    Feature("server", "metrics, loads, dashboard", "/metrics, /v1/loads, --metrics-aliases"),
    Feature("server", "logs of requests, crash dumps, replay", "--log-requests, --crash-dump-folder"),
    Feature("server", "OpenTelemetry traces", "--enable-trace"),
    Feature("server", "profiles of the engine", "/start_profile"),
    Feature("server", "OpenAPI document", "/openapi.json"),
    Feature("model", "Llama 2 and 3 with rope scaling", "config.json"),
    Feature("model", "Mistral with sliding window", "config.json"),
    Feature("model", "Qwen2, Qwen2.5", "config.json"),
    Feature("model", "Qwen3 dense", "config.json"),
    Feature("server", "playground: chat, tokens, comparison, in the browser", "GET /"),
    Feature("server", "live view: radix tree, requests, steps", "GET /v1/live, GET /v1/live/details"),
    Feature("compute", "float32, bfloat16", "--dtype"),
    Feature("compute", "CPU: native kernels (portable, AVX2, AVX-512, AVX-512 BF16, AMX)", "--device cpu"),
    Feature("compute", "weights rounded at start-up to int8 or int4", "--quantization"),
    Feature("compute", "NVIDIA GPU", "--device cuda"),
    Feature("server", "keys for users and for admins", "--api-key, --admin-api-key"),
    Feature("server", "HTTPS, with certificates of clients", "--ssl-certfile, --ssl-ca-certs"),
    Feature("server", "Unix socket", "--uds"),
    Feature("server", "pages of other origins", "--cors-allow-origin"),
    Feature("server", "drain with a deadline", "--drain-timeout"),
    Feature("server", "several API processes before one engine", "--tokenizer-worker-num"),
    Feature("model", "quantised checkpoints (AWQ, GPTQ, FP8, GGUF)", "config.json", "planned"),
    Feature("request", "LoRA adapters", "lora_path", "planned"),
    Feature("request", "images", "image_url", "planned"),
    Feature("scheduling", "speculative decoding", "--speculative-algorithm", "planned"),
    Feature("cache", "host and disk tiers", "--enable-hierarchical-cache", "planned"),
    Feature("model", "mixture of experts", "config.json", "planned"),
    Feature("compute", "tensor, pipeline, data parallelism", "--tp-size", "planned"),
    Feature("compute", "prefill and decode apart", "--disaggregation-mode", "planned"),
    Feature("compute", "CUDA graphs", "--cuda-graph-max-bs-decode", "planned"),
)

EXCLUSIONS: tuple[Exclusion, ...] = (
    Exclusion(
        "steps smaller than the batch",
        "a step runs one token of each running request at least",
        lambda c: c.scheduler.step_tokens < c.scheduler.max_running,
    ),
    Exclusion(
        "a context longer than the KV pool",
        "a request's own KV must fit the pool",
        lambda c: c.scheduler.max_context > c.cache.num_tokens,
    ),
    Exclusion(
        "waiting for a prefix without a prefix cache",
        "what another request computed can only be reused through the cache",
        lambda c: c.scheduler.prefill_wait and not c.cache.prefix_cache,
    ),
)


def check_compatible(config: EngineConfig) -> None:
    """The start-up check. Raises RequestError naming the exclusion that the configuration meets."""
    for exclusion in EXCLUSIONS:
        if exclusion.clash(config):
            raise RequestError(
                f"cannot be had: {exclusion.name}; {exclusion.why}", code="incompatible", param=exclusion.name
            )


def capability_table_markdown() -> str:
    """The page `docs/capabilities.md`."""
    built = [f for f in FEATURES if f.status == "built"]
    lines = [
        "# Capabilities",
        "",
        "Made by `make docs` from `src/trunkline/config/compat.py`. Every built feature works with",
        "every other one. Those with tested settings may not change an output bit: the metamorphic matrix",
        "(`tests/model`) runs every pair of these settings and compares tokens and log-probabilities.",
        "Settings that round (with a *) change outputs; with each of them, all others may not.",
        "",
        "| area | feature | chosen by | works with | tested settings |",
        "|---|---|---|---|---|",
    ]
    for f in sorted(built, key=_area):
        values = ", ".join(str(v).lower() for v in f.values) + " *" * f.rounds
        lines.append(f"| {f.area} | {f.name} | {f.how} | all | {values} |")
    lines += ["", "## Impossible by nature", "", "| together | why |", "|---|---|"]
    lines += [f"| {x.name} | {x.why} |" for x in EXCLUSIONS]
    lines += [
        "",
        "## Not built yet",
        "",
        "Refused by name (HTTP 400, exit status 2).",
        "",
        "| area | feature | asked for by |",
    ]
    lines += ["|---|---|---|"]
    lines += [
        f"| {f.area} | {f.name} | {f.how} |" for f in sorted(FEATURES, key=_area) if f.status == "planned"
    ]
    return "\n".join(lines) + "\n"


def _area(feature: Feature) -> int:
    return ("model", "compute", "cache", "scheduling", "request", "server").index(feature.area)


def matrix_axes() -> dict[str, tuple[AxisValue, ...]]:
    """The knobs of the metamorphic matrix and their settings, the plainest setting not necessarily first.

    `batch`: requests alone, submitted together, or one by one while others run. `pool`: "tight" holds so few
    pages that requests are preempted. The others are configuration fields.
    """
    return {f.axis: f.values for f in FEATURES if f.axis and f.status == "built"}


def pairwise(axes: Mapping[str, Sequence[AxisValue]]) -> list[dict[str, AxisValue]]:
    """Few combinations in which every pair of settings of two axes occurs (a covering array of strength 2).

    Greedy and deterministic: each row starts from the first pair not yet seen, then takes on every other axis
    the setting that adds most pairs.
    """
    names = list(axes)
    missing = {
        ((a, x), (b, y)): None for a, b in combinations(names, 2) for x in axes[a] for y in axes[b]
    }  # a dict as an ordered set
    rows: list[dict[str, AxisValue]] = []
    while missing:
        row: dict[str, AxisValue] = dict(next(iter(missing)))
        for name in names:
            if name not in row:
                row[name] = max(axes[name], key=lambda v: len(_new_pairs(missing, names, {**row, name: v})))
        for pair in _new_pairs(missing, names, row):
            del missing[pair]
        rows.append({name: row[name] for name in names})
    return rows


Pair = tuple[tuple[str, AxisValue], tuple[str, AxisValue]]


def _new_pairs(missing: Mapping[Pair, None], names: list[str], row: Mapping[str, AxisValue]) -> list[Pair]:
    """Pairs of `row` that no earlier row has."""
    chosen = [(name, row[name]) for name in names if name in row]
    return [pair for pair in combinations(chosen, 2) if pair in missing]
