"""`python -m tests.soak --url http://127.0.0.1:30000 --clients 8 --seconds 1800`: a line of JSON every 30 s.
The last one is of the whole run; exit status 1 on a fault: an error, another answer, KV held, or memory or
open files that grow.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from typing import Any

from tests.soak.clients import is_clean, storm


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=float, default=30.0, help="seconds between two lines")
    args = parser.parse_args()

    def report(figures: dict[str, Any]) -> None:
        print(json.dumps(figures), flush=True)

    storming = storm(args.url, args.clients, args.seconds, args.seed, report=report, every=args.every)
    figures = asyncio.run(storming)
    clean = is_clean(figures)
    report({"ended": "clean" if clean else "with faults", **figures})
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
