"""`trunkline bench`: finds the benchmark."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

from trunkline.types import RequestError

ABOUT = """usage: trunkline bench offline|serving|overhead|startup|scheduler|kernels|grammar [FLAGS]

  offline    an engine in this process: prompt and output tokens a second, latencies
  serving    a server under open-loop load: a running one (--url), or one started for the purpose
  overhead   what the API server itself costs, with an engine that computes nothing
  startup    from the start of a server's process to its first token, and the memory that takes
  scheduler  what a step costs beside the model, with many rows
  kernels    single operations against the limits of this machine
  grammar    compile times and masks of constraints, with a model's vocabulary

`trunkline bench NAME --help` lists the flags. --json prints one line of JSON.
"""


def run(words: list[str]) -> int:
    kind = words[0] if words else ""
    if kind in ("-h", "--help"):
        sys.stdout.write(ABOUT)
        return 0
    if kind not in ("offline", "serving", "overhead", "startup", "scheduler", "kernels", "grammar"):
        raise RequestError(
            f"{kind!r} is no benchmark: choose offline, serving, overhead, startup, scheduler, kernels or "
            "grammar",
            code="unknown_flag",
            param=kind,
        )
    bench: Callable[[list[str]], int] = import_module(f"trunkline.bench.{kind}").run
    return bench(words[1:])
