"""From flags to what operators and users can look at."""

from __future__ import annotations

import math
from itertools import pairwise

from trunkline.config.flags import Args, spelling
from trunkline.config.schema import ObserveConfig
from trunkline.types import RequestError


def resolve_observe(args: Args) -> ObserveConfig:
    """Raises RequestError for a flag that can't be honored."""
    requests_format = args.log_requests_format or args.log_format
    return ObserveConfig(
        log_format="json" if args.log_format == "json" else "text",
        log_requests=args.log_requests,
        log_requests_level=args.log_requests_level,
        log_requests_format="json" if requests_format == "json" else "text",
        crash_dump_folder=args.crash_dump_folder,
        crash_dump_prompts=args.crash_dump_prompts,
        metrics_aliases="sglang" if args.metrics_aliases == "sglang" else "none",
        first_token_buckets=_buckets(args, "bucket_time_to_first_token"),
        between_tokens_buckets=_buckets(args, "bucket_inter_token_latency"),
        request_buckets=_buckets(args, "bucket_e2e_request_latency"),
        allow_unknown_fields=args.allow_unknown_fields,
        profile_folder=args.profile_folder,
        trace=args.enable_trace,
        otlp_endpoint=args.otlp_traces_endpoint,
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
