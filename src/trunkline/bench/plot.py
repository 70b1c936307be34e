"""A picture of a load test: how latencies are distributed, and what went on over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trunkline.bench.client import Sample
from trunkline.types import RequestError

_BINS = 60  # of the time axis


def require(name: str) -> None:
    """Raises RequestError when the picture could not be made."""
    if Path(name).suffix not in (".png", ".svg"):
        raise RequestError(f"--plot {name}: write a .png or .svg file", code="invalid_flag", param="--plot")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RequestError(
            "--plot needs matplotlib: pip install 'trunkline[plot]'", code="missing_package", param="--plot"
        ) from None


def draw(samples: Sequence[Sample], path: Path) -> None:
    """Write the picture. Failed requests are marked where they were due."""
    from matplotlib.figure import Figure

    done = [sample for sample in samples if sample.error is None]
    figure = Figure(figsize=(11, 7), layout="constrained")
    (left, right), (below, beside) = figure.subplots(2, 2)
    _distribution(left, "time to first token", [sample.ttft for sample in done])
    _distribution(right, "between tokens", [gap for sample in done for gap in sample.gaps])
    below.plot([s.due for s in done], [s.ttft * 1000 for s in done], ".", markersize=4, label="completed")
    failed = [sample.due for sample in samples if sample.error is not None]
    below.plot(failed, [0.0] * len(failed), "x", color="tab:red", label=f"failed ({len(failed)})")
    below.set(title="first token, by arrival", xlabel="s since the start", ylabel="ms")
    below.legend(loc="upper left", frameon=False)
    _throughput(beside, done)
    for axis in (left, right, below, beside):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _distribution(axis: Any, title: str, seconds: Sequence[float]) -> None:
    """Share of values at or below each time, with the percentiles that people ask for."""
    ordered = sorted(value * 1000 for value in seconds)
    axis.set(title=title, xlabel="ms", ylabel="share of all")
    if not ordered:
        return
    axis.plot(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))])
    for percent in (50, 99):
        value = ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]
        axis.axvline(value, linestyle=":", color="gray")
        axis.text(value, 0.02, f" p{percent} {value:.4g}", fontsize=8)


def _throughput(axis: Any, done: Sequence[Sample]) -> None:
    """Output tokens a second and requests in progress. Tokens are spread evenly over the time that a request
    generated in."""
    end = max((sample.due + sample.total for sample in done), default=0.0)
    width = end / _BINS or 1.0
    tokens, active = [0.0] * _BINS, [0.0] * _BINS
    for sample in done:
        first, last = sample.due + sample.ttft, sample.due + sample.total
        for k in range(_BINS):
            low, high = k * width, (k + 1) * width
            active[k] += max(0.0, min(high, last) - max(low, sample.due)) / width
            overlap = min(high, last) - max(low, first)
            if last > first and overlap > 0:
                tokens[k] += sample.output_tokens * overlap / (last - first) / width
            elif last == first and low <= first < high:
                tokens[k] += sample.output_tokens / width
    times = [(k + 0.5) * width for k in range(_BINS)]
    axis.plot(times, tokens)
    axis.set(title="throughput and load", xlabel="s since the start", ylabel="output tokens/s")
    load = axis.twinx()
    load.plot(times, active, color="tab:orange", alpha=0.7)
    load.set_ylabel("requests in progress", color="tab:orange")
    load.spines["top"].set_visible(False)
