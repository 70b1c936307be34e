"""From flags to what operators and users can look at."""

from __future__ import annotations

import math
from itertools import pairwise

from trunkline.config.flags import Args, spelling
from trunkline.config.schema import ObserveConfig
from trunkline.types import RequestError


def resolve_observe(args: Args) -> ObserveConfig:
    """Raises RequestError for a flag that can't be honored."""
    return ObserveConfig(
        metrics_aliases="sglang" if args.metrics_aliases == "sglang" else "none",
        first_token_buckets=_buckets(args, "bucket_time_to_first_token"),
        between_tokens_buckets=_buckets(args, "bucket_inter_token_latency"),
        request_buckets=_buckets(args, "bucket_e2e_request_latency"),
        prefix_miss_tokens=args.enable_prefix_miss_tokens,
    )


def _buckets(args: Args, attribute: str) -> tuple[float, ...]:
    text: str | None = getattr(args, attribute)
    if text is None:
        return ()
    try:
        bounds = tuple(float(word) for word in text.replace(",", " ").split())
    except ValueError:
        bounds = ()
    grows = all(a < b for a, b in pairwise(bounds))
    if not bounds or not grows or bounds[0] <= 0 or not math.isfinite(bounds[-1]):
        name = spelling(attribute)
        raise RequestError(
            f"{name} is {text[:100]!r}; it must be growing numbers of seconds above 0, e.g. 0.1,0.5,1",
            code="invalid_flag",
            param=name,
        )
    return bounds
