"""`trunkline bench`: finds the benchmark."""

from __future__ import annotations

import sys

from trunkline.types import RequestError

ABOUT = """usage: trunkline bench offline|serving|kernels [FLAGS]

  offline   an engine in this process: prompt and output tokens a second, latencies
  serving   a server under open-loop load: a running one (--url), or one started for the purpose
  kernels   single operations against the limits of this machine

`trunkline bench NAME --help` lists the flags. --json prints one line of JSON.
"""


def run(words: list[str]) -> int:
    kind, rest = (words[0], words[1:]) if words else ("", [])
    if kind == "offline":
        from trunkline.bench import offline

        return offline.run(rest)
    if kind == "serving":
        from trunkline.bench import serving

        return serving.run(rest)
    if kind == "kernels":
        from trunkline.bench import kernels

        return kernels.run(rest)
    if kind in ("-h", "--help"):
        sys.stdout.write(ABOUT)
        return 0
    raise RequestError(
        f"{kind!r} is not a benchmark: choose offline, serving or kernels" if kind else
        "say which benchmark: offline, serving or kernels", code="unknown_flag", param=kind or None,
    )  # fmt: skip
