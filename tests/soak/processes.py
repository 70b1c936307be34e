"""Memory and open files of the server's processes while it is soaked, and whether they grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import psutil

MIB = 1 << 20
MOST_GROWTH = {"rss_mib": 16.0, "fds": 8.0}  # over the second half, along a fitted line
START = 0.1  # of the run is warm-up


def server_processes(url: str) -> dict[str, psutil.Process]:
    """The process that listens at `url`, and its engine cores. Raises RuntimeError if it is not here."""
    port = urlsplit(url).port
    for found in psutil.net_connections("tcp"):
        if found.status == psutil.CONN_LISTEN and found.laddr.port == port and found.pid:
            api = psutil.Process(found.pid)
            cores = [p for p in api.children() if "trunkline.engine.process" in " ".join(p.cmdline())]
            return {"api": api} | {f"core {i}" if i else "core": p for i, p in enumerate(cores)}
    raise RuntimeError(f"no process of this machine listens at {url}: the soak watches memory and open files")


@dataclass
class Watch:
    """Samples of each process; `seconds` of a sample is the time since the start of the traffic."""

    processes: dict[str, psutil.Process]
    times: list[float] = field(default_factory=list)
    samples: dict[str, list[float]] = field(default_factory=dict)

    def sample(self, seconds: float) -> None:
        self.times.append(seconds)
        for name, process in self.processes.items():
            self.samples.setdefault(f"{name} rss_mib", []).append(process.memory_info().rss / MIB)
            self.samples.setdefault(f"{name} fds", []).append(process.num_fds())

    def figures(self) -> dict[str, dict[str, Any]]:
        """Start (after the warm-up), now, most, and the growth over the second half, of each series."""
        warm = min((i for i, t in enumerate(self.times) if t >= START * self.times[-1]), default=0)
        found = {}
        for name, values in self.samples.items():
            half = len(values) // 2
            length = self.times[-1] - self.times[half]
            growth = slope(self.times[half:], values[half:]) * length
            bound = MOST_GROWTH[name.split()[-1]]
            found[name] = {
                "start": round(values[warm], 1),
                "now": round(values[-1], 1),
                "max": round(max(values), 1),
                "second_half": round(growth, 1),
                "grows": growth > bound,
            }
        return found


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """Of the least-squares line."""
    middle, height = sum(times) / len(times), sum(values) / len(values)
    spread = sum((t - middle) ** 2 for t in times)
    return (
        sum((t - middle) * (v - height) for t, v in zip(times, values, strict=True)) / spread
        if spread
        else 0.0
    )
