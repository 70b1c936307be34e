"""Results, one JSON line each, as a Markdown table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from statistics import median

from benchmarks.peers.rounds import Result
from benchmarks.peers.workloads import WORKLOADS, Workload

OURS = "trunkline"


def read(lines: Iterable[str]) -> list[Result]:
    """Results of a file. Raises ValueError that names the line that is none."""
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            result = json.loads(line)
            known = result["workload"] in WORKLOADS and isinstance(result["engine"], str)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} is no result: {line.strip()[:80]}") from error
        if not known or ("value" not in result and "error" not in result):
            raise ValueError(f"line {number} is no result: {line.strip()[:80]}")
        found.append(result)
    return found


def table(results: list[Result]) -> str:
    """Medians and ranges, one row a workload, and Trunkline over the best peer."""
    engines = sorted({str(result["engine"]) for result in results}, key=lambda name: (name != OURS, name))
    names = [name for name in WORKLOADS if any(result["workload"] == name for result in results)]
    heads = ["workload", "unit", *(f"{name} {versions(results, name)}".strip() for name in engines)]
    rows = [[*heads, "Trunkline / best peer"], ["---"] * (len(heads) + 1)]
    for name in names:
        row = WORKLOADS[name]
        unit = row.unit + (" (lower is better)" if row.lower_is_better else "")
        cells = [cell(of(results, name, engine)) for engine in engines]
        rows.append([f"**{name}** {row.about}", unit, *cells, ratio(results, row)])
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([*lines, "", footer(results)])


def of(results: list[Result], workload: str, engine: str) -> list[Result]:
    return [result for result in results if (result["workload"], result["engine"]) == (workload, engine)]


def values(results: list[Result]) -> list[float]:
    return [float(str(result["value"])) for result in results if "value" in result]


def cell(results: list[Result]) -> str:
    """`median (low-high)`; how many runs failed, and the last reason."""
    found, errors = values(results), [str(result["error"]) for result in results if "error" in result]
    parts = []
    if found:
        spread = f" ({number(min(found))}-{number(max(found))})" if len(found) > 1 else ""
        parts.append(number(median(found)) + spread)
    if errors:
        some = f"{len(errors)} of {len(results)} " if found else ""
        parts.append(f"{some}failed: {errors[-1]}".replace("|", "/"))
    return "; ".join(parts) or "-"


def ratio(results: list[Result], workload: Workload) -> str:
    """Median over median of the best peer, with its name; "-" where either is missing."""
    medians = {}
    for engine in {str(result["engine"]) for result in results}:
        if found := values(of(results, workload.name, engine)):
            medians[engine] = median(found)
    ours = medians.pop(OURS, None)
    if ours is None or not medians:
        return "-"
    best = (min if workload.lower_is_better else max)(medians, key=lambda name: medians[name])
    return f"{ours / medians[best]:.2f} x {best}" if medians[best] > 0 else "-"


def versions(results: list[Result], engine: str) -> str:
    return ", ".join(
        sorted({str(r["version"]) for r in results if r["engine"] == engine and r.get("version")})
    )


def footer(results: list[Result]) -> str:
    dates = sorted({str(result["date"])[:10] for result in results})
    machines = sorted({f"{result['machine']}, {result['threads']} threads" for result in results})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}" if dates else "no runs"
    return f"Measured {when} on {'; '.join(machines)}. Medians and ranges of interleaved runs."


def number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
