"""`python -m tests.soak --url http://127.0.0.1:30000 --clients 64 --seconds 120`: prints one JSON line."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys

from tests.soak.clients import Tally, is_clean, storm


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    def progress(elapsed: float, tally: Tally) -> None:
        rate = (tally.finished + tally.disconnected) / max(elapsed, 1e-9)
        left = max(0.0, args.seconds - elapsed)
        faults = len(tally.errors) + len(tally.wrong)
        line = f"{elapsed:5.0f} s, {left:.0f} s left, {rate:.1f} requests/s, {faults} faults"
        print(f"\r{line}", end="", file=sys.stderr, flush=True)

    figures = asyncio.run(storm(args.url, args.clients, args.seconds, args.seed, progress))
    print(file=sys.stderr)
    print(json.dumps(figures))
    return 0 if is_clean(figures) else 1


if __name__ == "__main__":
    sys.exit(main())
