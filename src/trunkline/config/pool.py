"""How many KV pages there are: what the flags ask for, or what the machine has room for."""

from __future__ import annotations

from dataclasses import replace

from trunkline.config.flags import Args
from trunkline.config.hardware import Hardware
from trunkline.config.memory import Demand, MemoryPlan, show
from trunkline.types import RequestError

_GIB = 1 << 30
_LEAST_TOKENS = 256  # a pool below this serves nobody


def size_pool(args: Args, demand: Demand, hardware: Hardware, why: dict[str, str]) -> tuple[int, MemoryPlan]:
    """Number of KV pages, and the whole plan."""
    on_gpu = demand.device == "cuda"
    available = hardware.gpus[0].free_bytes if on_gpu else hardware.available_bytes
    total = hardware.gpus[0].total_bytes if on_gpu else hardware.total_bytes
    empty = demand.plan(0, available, total)
    room = available - empty.needed
    if args.mem_fraction_static is not None:
        room = min(room, int(total * args.mem_fraction_static) - demand.weights().bytes)
    asked = _asked_pages(args, demand.page_bytes, why)
    least = -(-min(_LEAST_TOKENS, demand.max_context) // args.page_size)
    need = (asked or least) * demand.page_bytes
    if need > room:
        raise _too_big(args, empty, need, room, demand, hardware)
    if asked is None:
        pages = max(least, _default_pages(args, demand, room, why))
    elif args.context_length is not None and asked * args.page_size < args.context_length:
        raise conflict(
            f"--context-length {args.context_length} does not fit a KV pool of {asked * args.page_size} "
            "tokens: give more of --max-total-tokens or --kv-memory, or a shorter context",
            "--context-length",
        )
    else:
        pages = asked
    held = replace(demand, max_context=min(demand.max_context, pages * args.page_size))
    return pages, held.plan(pages, available, total)


def _asked_pages(args: Args, per_page: int, why: dict[str, str]) -> int | None:
    if args.max_total_tokens is not None and args.kv_memory is not None:
        raise conflict("--max-total-tokens and --kv-memory both size the KV pool: give one", "--kv-memory")
    if args.max_total_tokens is not None:
        pages = args.max_total_tokens // args.page_size
        why["cache.num_pages"] = f"--max-total-tokens {args.max_total_tokens:,}"
    elif args.kv_memory is not None:
        pages = args.kv_memory // per_page
        why["cache.num_pages"] = f"--kv-memory {show(args.kv_memory)}"
    else:
        return None
    if pages == 0:
        name = "--kv-memory" if args.max_total_tokens is None else "--max-total-tokens"
        raise RequestError(
            f"{name} is below one page of {args.page_size} tokens ({show(per_page)})",
            code="pool_too_small",
            param=name,
        )
    return pages


def _default_pages(args: Args, demand: Demand, room: int, why: dict[str, str]) -> int:
    """Enough for every running request at full length, within the room that is left.

    A GPU is the engine's but for 1 GiB of workspaces; on a CPU half of the room stays for other programs
    and the file cache, unless a full request needs more. --mem-fraction-static replaces both rules.
    """
    one = -(-demand.max_context // demand.page_size)
    wanted = one * demand.max_running
    if args.mem_fraction_static is not None:
        limit, reason = room // demand.page_bytes, f"--mem-fraction-static {args.mem_fraction_static:g}"
    elif demand.device == "cuda":
        limit, reason = max(room - _GIB, 0) // demand.page_bytes, "the GPU's free memory less 1 GiB"
    else:
        limit, reason = room // 2 // demand.page_bytes, "half of the free memory"
        if limit < one:
            limit = min(one, room // demand.page_bytes)
            reason = "one request of full length, or all the free memory"
    if wanted <= limit:
        limit, reason = wanted, f"{demand.max_running} requests of {demand.max_context:,} tokens"
    why["cache.num_pages"] = reason
    return limit


def _too_big(
    args: Args, plan: MemoryPlan, need: int, room: int, demand: Demand, hardware: Hardware
) -> RequestError:
    """By how much it does not fit, and what would help, largest saving first."""
    weights, activations = plan.size_of("weights"), plan.size_of("activations")
    rows = plan.size_of("sampling") + plan.size_of("rows")
    sized = args.max_total_tokens is not None or args.kv_memory is not None
    helps = [
        (rows // 2, f"half of --max-running-requests saves {show(rows // 2)}"),
        (activations // 2, f"half of --chunked-prefill-size saves {show(activations // 2)}"),
    ]
    if demand.dtype == "float32" and (demand.device == "cuda" or hardware.packs_bfloat16):
        helps.append((weights // 2, f"--dtype bfloat16 saves {show(weights // 2)} of weights"))
    if sized and room >= demand.page_bytes:
        helps.append(
            (need, f"--max-total-tokens {room // demand.page_bytes * args.page_size} is the most that fits")
        )
    if args.mem_fraction_static is not None:
        helps.append((need - room, "a larger --mem-fraction-static"))
    advice = "; ".join(text for saving, text in sorted(helps, reverse=True)[:3] if saving > 0)
    parts = ", ".join(f"{item.name} {show(item.bytes)}" for item in plan.items if item.bytes)
    there = f"{show(plan.available)} is available"
    if args.mem_fraction_static is not None:
        there += f" and weights and KV pool may take {args.mem_fraction_static:g} of {show(plan.total)}"
    return RequestError(
        f"too little memory: {parts}, and {show(need)} for the KV pool; {there}: {show(need - room)} short. "
        f"What helps: {advice}; or a smaller model",
        code="too_little_memory",
        param="--max-total-tokens" if sized else "--model-path",
    )


def conflict(message: str, param: str) -> RequestError:
    return RequestError(message, code="conflicting_flags", param=param)
