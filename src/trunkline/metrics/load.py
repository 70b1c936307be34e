"""How loaded an engine is: the core's own figures under the names that dashboards and routers know."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from trunkline.messages import Ready, Stats

WINDOW = 30.0  # seconds over which throughput is measured, where figures are asked for that often
GIB = 2**30

CORE_GAUGES: Mapping[str, str] = {
    "num_running_reqs": "Requests that hold KV pages now",
    "num_queue_reqs": "Requests that wait for admission",
    "num_grammar_queue_reqs": "Requests that wait for their grammar to be compiled",
    "num_used_tokens": "KV pool: tokens of pages in use",
    "num_cached_tokens": "KV pool: tokens of pages that only the prefix cache holds",
    "max_total_num_tokens": "KV pool: tokens that it holds",
    "token_usage": "KV pool: share in use",
    "cache_hit_rate": "Share of prompt tokens taken from the prefix cache since start",
    "new_token_ratio": "Share of the asked-for output that admission reserves",
    "utilization": "Share of rows or of KV pages in use, the larger of both",
    "gen_throughput": "Generated tokens a second, over the last scrapes",
}
CORE_COUNTERS: Mapping[str, str] = {
    "num_retracted_requests": "Times a request was preempted",
    "evicted_tokens": "Tokens whose KV was evicted from the prefix cache",
    "engine_steps": "Steps that the engine has run",
    "computed_tokens": "Tokens that steps have computed, of prompts and outputs",
    "num_grammars": "Grammars that requests have asked for",
    "num_grammars_refused": "Grammars that could not be compiled",
}


def core_gauges(stats: Stats) -> dict[str, float]:
    """Those of CORE_GAUGES that one look at the core shows."""
    gauges, counters = stats.gauges, stats.counters
    size, total = gauges["page_size"], gauges["pages_total"]
    share = gauges["pages_in_use"] / total
    return {
        "num_running_reqs": gauges["running"],
        "num_queue_reqs": gauges["waiting"] - gauges["compiling"],
        "num_grammar_queue_reqs": gauges["compiling"],
        "num_used_tokens": gauges["pages_in_use"] * size,
        "num_cached_tokens": gauges["pages_cached"] * size,
        "max_total_num_tokens": total * size,
        "token_usage": share,
        "cache_hit_rate": counters["cached_tokens"] / max(counters["prompt_tokens"], 1),
        "new_token_ratio": gauges["new_token_ratio"],
        "utilization": max(share, gauges["running"] / gauges["max_running"]),
    }


def core_counters(stats: Stats) -> dict[str, float]:
    counters = stats.counters
    return {
        "num_retracted_requests": counters["retractions"],
        "evicted_tokens": counters["evicted_tokens"],
        "engine_steps": counters["steps"],
        "computed_tokens": counters["computed_tokens"],
        "num_grammars": counters["grammars"],
        "num_grammars_refused": counters["grammars_refused"],
    }


class Throughput:
    """Growth of a counter a second, from looks at it: over the last WINDOW, or since the look before that."""

    def __init__(self, since_start: bool = True) -> None:
        """`since_start`: the counter begins now, at 0; else the first look tells where it is."""
        self._looks: deque[tuple[float, float]] = deque([(time.monotonic(), 0.0)] if since_start else ())

    def rate(self, total: float) -> float:
        now = time.monotonic()
        if not self._looks:
            self._looks.append((now, total))
        if total < self._looks[-1][1]:  # the core was started anew
            self._looks = deque([(now, 0.0)])
        while len(self._looks) > 1 and now - self._looks[1][0] > WINDOW:
            self._looks.popleft()
        at, before = self._looks[0]
        if now - self._looks[-1][0] > 0.5:
            self._looks.append((now, total))
        return (total - before) / (now - at) if now > at else 0.0


SECTIONS = ("core", "memory", "queues")
# Sections of the reference for what no server here does -> their names in an answer, where they are null.
NOT_HERE: Mapping[str, str] = {"spec": "speculative", "lora": "lora", "disagg": "disaggregation"}


def load_of(stats: Stats, ready: Ready, throughput: float, include: tuple[str, ...]) -> dict[str, Any]:
    """One entry of /v1/loads."""
    gauges = core_gauges(stats)
    running, waiting = int(gauges["num_running_reqs"]), int(stats.gauges["waiting"])
    load: dict[str, Any] = {"dp_rank": 0}
    if "core" in include:
        load |= {
            "num_running_reqs": running,
            "num_waiting_reqs": waiting,
            "num_total_reqs": running + waiting,
            "num_used_tokens": int(gauges["num_used_tokens"]),
            "num_total_tokens": int(gauges["num_used_tokens"]),
            "max_total_num_tokens": int(gauges["max_total_num_tokens"]),
            "max_running_requests": ready.max_running,
            "token_usage": gauges["token_usage"],
            "gen_throughput": throughput,
            "cache_hit_rate": gauges["cache_hit_rate"],
            "utilization": gauges["utilization"],
        }
    if "memory" in include:
        load["memory"] = {
            "weight_gb": float(ready.info.get("weight_bytes") or 0) / GIB,
            "kv_cache_gb": float(ready.info.get("kv_pool_bytes") or 0) / GIB,
            "graph_gb": 0.0,
            "token_capacity": ready.num_pages * ready.page_size,
        }
    if "queues" in include:
        compiling = int(stats.gauges["compiling"])
        load["queues"] = {"waiting": waiting - compiling, "grammar": compiling, "paused": 0, "retracted": 0}
    return load | {name: None for word, name in NOT_HERE.items() if word in include}
