"""`trunkline bench kernels`: single operations against what this machine can do.

The limits are measured in the same run: bytes read a second by a sum over a large tensor, and operations a
second by a large square product. An operation's own limit is the slower of the two for its bytes and work.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trunkline
from trunkline.config.cli import help_text, parse, wants_help
from trunkline.config.flags import flag
from trunkline.config.hardware import detect, share_cores
from trunkline.types import RequestError

if TYPE_CHECKING:
    import torch

ABOUT = "Measure the linear layer and attention, and compare with the memory and arithmetic of this machine."
LINEAR_SIZES = ((1024, 1024), (4096, 1024), (6144, 1024), (1024, 3072), (32768, 1024))  # (outputs, inputs)
ROWS = (1, 4, 16, 64, 256)
ATTENTION_SHAPES = (
    (1, 1, 1024),
    (8, 1, 1024),
    (32, 1, 1024),
    (1, 256, 256),
    (1, 256, 2048),
)  # (requests, new, keys)
HEADS, KV_HEADS, HEAD_DIM, PAGE = 16, 8, 128, 16
COLD_BYTES = 192 << 20  # weights are cycled through so many bytes, so that no cache holds them


@dataclass(frozen=True, kw_only=True)
class Options:
    dtype: str = flag(
        "text", "of weights and activations. auto: bfloat16 where the kernels take it", default="auto",
        choices=("auto", "float32", "bfloat16"),
    )  # fmt: skip
    device: str = flag("text", "where to compute", default="cpu", choices=("cpu", "cuda"))
    cpu_threads: int | None = flag(
        "int", "threads. Default: the cores this process may use", low=1, high=1024
    )
    seconds: float = flag("float", "time for each measurement", default=0.2, low=0.001, high=60.0)
    json: bool = flag("bool", "print one line of JSON")


@dataclass(frozen=True)
class Bench:
    """How to measure: each measurement takes about `seconds`, after one call to warm up."""

    device: torch.device
    dtype: torch.dtype
    seconds: float

    def time(self, call: Callable[[int], object]) -> float:
        """Seconds of one call, the median of batches. `call` gets a running number."""
        call(0)
        spans: list[float] = []
        done, end = 1, time.perf_counter() + self.seconds
        while not spans or time.perf_counter() < end:
            self.wait()
            started = time.perf_counter()
            for _ in range(4):
                call(done)
                done += 1
            self.wait()
            spans.append((time.perf_counter() - started) / 4)
        return sorted(spans)[len(spans) // 2]

    def wait(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()

    def random(self, *shape: int) -> torch.Tensor:
        import torch

        return torch.randn(*shape, dtype=torch.float32).to(self.device, self.dtype)


@dataclass(frozen=True)
class Limits:
    """Of this machine, measured now."""

    bytes_per_s: float
    flops_per_s: float

    def seconds(self, size: float, work: float) -> float:
        """The least time for so many bytes and operations."""
        return max(size / self.bytes_per_s, work / self.flops_per_s)


def run(words: list[str]) -> int:
    if wants_help(words):
        sys.stdout.write(help_text("trunkline bench kernels [FLAGS]", ABOUT, Options))
        return 0
    options = parse(words, Options)
    result = measure(options)
    if options.json:
        print(json.dumps(result))
    else:
        print_table(result)
    return 0


def measure(options: Options) -> dict[str, Any]:
    """All measurements. Raises RequestError when the device or dtype cannot be had."""
    hardware = detect()
    share_cores()
    if options.device == "cuda" and not hardware.cuda:
        raise RequestError(
            "--device cuda: no GPU that torch can use", code="device_unavailable", param="--device"
        )
    import torch

    from trunkline.kernels import describe, load_kernels

    kernels = load_kernels(torch.device(options.device))
    threads = options.cpu_threads or hardware.threads_wanted or hardware.cores
    torch.set_num_threads(threads)
    multiplied = options.device == "cuda" or hardware.fast_bfloat16
    fast = multiplied or hardware.native_kernels
    name = options.dtype if options.dtype != "auto" else "bfloat16" if fast else "float32"
    bench = Bench(torch.device(options.device), getattr(torch, name), options.seconds)
    if not kernels.supports_linear(bench.dtype, bench.device):
        raise RequestError(
            f"--dtype {name}: this machine multiplies no such numbers",
            code="dtype_unavailable",
            param="--dtype",
        )
    with torch.inference_mode():
        limits = measure_limits(bench, bench.dtype if multiplied else torch.float32)
        linear = [linear_point(bench, limits, kernels, n, k, m) for n, k in LINEAR_SIZES for m in ROWS]
        attention = [attention_point(bench, limits, kernels, *shape) for shape in ATTENTION_SHAPES]
    return {
        "bench": "kernels",
        "version": trunkline.__version__,
        "device": options.device,
        "kernels": describe(kernels),
        "dtype": name,
        "threads": threads,
        "read_gb_per_s": round(limits.bytes_per_s / 1e9, 2),
        "peak_gflop_per_s": round(limits.flops_per_s / 1e9, 1),
        "linear": linear,
        "attention": attention,
    }


def measure_limits(bench: Bench, dtype: torch.dtype) -> Limits:
    """`dtype`: what the processor multiplies, which may be wider than what is stored."""
    import torch

    large = torch.ones(COLD_BYTES // 4, dtype=torch.float32, device=bench.device)
    read = bench.time(lambda _: large.sum())
    side = 1024
    a, b = bench.random(side, side).to(dtype), bench.random(side, side).to(dtype)
    return Limits(COLD_BYTES / read, 2 * side**3 / bench.time(lambda _: a @ b))


def linear_point(bench: Bench, limits: Limits, kernels: Any, n: int, k: int, m: int) -> dict[str, Any]:
    """One product of [m, k] by [k, n]. Different weights for each call."""
    first = kernels.pack_linear([bench.random(n, k)], [])
    copies = min(64, max(1, COLD_BYTES // first.nbytes))
    packed = [first] + [kernels.pack_linear([bench.random(n, k)], []) for _ in range(copies - 1)]
    x = bench.random(m, k)
    took = bench.time(lambda i: kernels.linear(x, packed[i % copies]))
    work = 2.0 * m * n * k
    moved = first.nbytes + (m * k + m * n) * x.element_size()
    return {
        "n": n,
        "k": k,
        "m": m,
        "us": round(took * 1e6, 1),
        "gb_per_s": round(first.nbytes / took / 1e9, 2),
        "gflop_per_s": round(work / took / 1e9, 1),
        "of_limit": round(limits.seconds(moved, work) / took, 3),
    }


def attention_point(
    bench: Bench, limits: Limits, kernels: Any, requests: int, new: int, keys: int
) -> dict[str, Any]:
    """Requests that each attend `new` last tokens over `keys` keys in pages. Planning is timed apart."""
    import torch

    from trunkline.kernels.ops import PagedShape

    pages = -(-keys // PAGE)
    shape = PagedShape(HEADS, KV_HEADS, HEAD_DIM, PAGE, requests * pages * PAGE)
    pool = bench.random(shape.num_slots + 1, 2, KV_HEADS, HEAD_DIM)
    table = torch.arange(requests * pages, dtype=torch.int32, device=bench.device).view(requests, pages)
    q_start = torch.arange(0, requests * new + 1, new, dtype=torch.int32, device=bench.device)
    lens = torch.full((requests,), keys, dtype=torch.int32, device=bench.device)
    q = bench.random(requests * new, HEADS, HEAD_DIM)
    plan = kernels.plan_attention(q_start, lens, table, None, shape)
    took = bench.time(lambda _: kernels.attention(q, pool, plan))
    planning = bench.time(lambda _: kernels.plan_attention(q_start, lens, table, None, shape))
    size = requests * keys * 2 * KV_HEADS * HEAD_DIM * pool.element_size()
    seen = new * keys - new * (new - 1) / 2  # (query, key) pairs of a causal request
    work = 4.0 * requests * seen * HEADS * HEAD_DIM
    return {
        "requests": requests,
        "new": new,
        "keys": keys,
        "us": round(took * 1e6, 1),
        "plan_us": round(planning * 1e6, 1),
        "gb_per_s": round(size / took / 1e9, 2),
        "gflop_per_s": round(work / took / 1e9, 1),
        "of_limit": round(limits.seconds(size, work) / took, 3),
    }


def print_table(result: dict[str, Any]) -> None:
    print(f"{result['dtype']} on {result['device']} ({result['kernels']}), {result['threads']} threads")
    print(f"reads {result['read_gb_per_s']} GB/s, computes {result['peak_gflop_per_s']} GFLOP/s")
    for kind, names in (("linear", ("n", "k", "m")), ("attention", ("requests", "new", "keys"))):
        columns = (*names, "us", "gb_per_s", "gflop_per_s", "of_limit")
        print(f"\n{kind}\n" + "".join(f"{c:>13}" for c in columns))
        for point in result[kind]:
            print("".join(f"{point[c]:>13}" for c in columns))
