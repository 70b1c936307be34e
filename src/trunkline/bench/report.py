"""What the benchmarks share: prompts, percentiles, and how a result is printed."""

from __future__ import annotations

import json
import random
import re
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import trunkline

Number = int | float | None
PERCENTILES = (50, 90, 95, 99)


def random_prompts(count: int, own_len: int, shared_len: int, vocab_size: int, seed: int) -> list[list[int]]:
    """`count` prompts of `shared_len` common and then `own_len` different tokens. Seeded.

    The last 1/64 of the vocabulary is left out: special tokens live there.
    """
    draw = random.Random(seed)
    high = max(1, vocab_size - max(8, vocab_size // 64))
    shared = [draw.randrange(high) for _ in range(shared_len)]
    return [shared + [draw.randrange(high) for _ in range(own_len)] for _ in range(count)]


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear interpolation between the closest ranks; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(name: str, values: Sequence[float]) -> dict[str, Number]:
    """`NAME_mean_ms` and percentiles of seconds, in milliseconds. Absent values are None."""
    mean = sum(values) / len(values) if values else None
    found: dict[str, Number] = {f"{name}_mean_ms": _ms(mean)}
    found |= {f"{name}_p{p}_ms": _ms(percentile(values, p)) for p in PERCENTILES}
    return found


def rate(count: float, seconds: float) -> float | None:
    """Per second; None when nothing was counted or no time passed."""
    return round(count / seconds, 2) if count > 0 and seconds > 0 else None


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_rss_of_tree(pid: int) -> int:
    """Largest resident sizes of a process and its children, added up (shared pages count more than once)."""
    import psutil  # type: ignore[import-untyped]

    root = psutil.Process(pid)
    total = 0
    for process in (root, *root.children(recursive=True)):
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            continue  # it has just ended
        peak = re.search(r"VmHWM:\s+(\d+) kB", status)
        total += int(peak.group(1)) * 1024 if peak else 0
    return total


def show(result: dict[str, object], *, as_json: bool) -> None:
    """One line of JSON, or a table for people."""
    result = {**result, "version": trunkline.__version__}
    if as_json:
        print(json.dumps(result), flush=True)
        return
    sys.stdout.flush()
    width = max(map(len, result))
    for name, value in result.items():
        if value is not None and not isinstance(value, dict):
            print(
                f"{name:<{width}}  {value:,}"
                if isinstance(value, int | float)
                else f"{name:<{width}}  {value}"
            )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
