"""`trunkline bench kernels`: single operations against what this machine can do.

The limits are measured in the same run, before and after, and the better counts. Native kernels: bytes read
a second from memory, and operations a second of the innermost loop on numbers of 32, 16 and 8 bits that stay
in the first cache. Plain torch: a sum over a large tensor and a large square product. An operation's own
limit is the slower of the two for its bytes and work. A shared machine's limits move: compare shares, not
figures.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import trunkline
from trunkline.config.cli import help_text, parse, wants_help
from trunkline.config.flags import flag
from trunkline.config.hardware import detect, share_cores
from trunkline.types import RequestError

if TYPE_CHECKING:
    import torch

Quantized = tuple[Literal[8, 4], int]  # bits, inputs that share a scale
ABOUT = "Measure linear layers, attention, sampling; compare with this machine's memory and arithmetic."
LINEAR_SIZES = ((1024, 1024), (4096, 1024), (6144, 1024), (1024, 3072), (32768, 1024))  # (outputs, inputs)
ROUNDED_SIZES = ((6144, 1024), (1024, 3072))
ROUNDED: Mapping[str, Quantized] = MappingProxyType({"int8": (8, 0), "int4": (4, 32), "int4-128": (4, 128)})
ROWS = (1, 4, 16, 32, 64, 256, 1024)
ATTENTION_SHAPES = (
    (1, 1, 1024, 0),
    (8, 1, 1024, 0),
    (32, 1, 1024, 0),
    (32, 1, 1088, 1024),
    (32, 1, 4096, 0),
    (32, 32, 1056, 1024),
    (1, 256, 256, 0),
    (1, 256, 2048, 0),
)  # (requests, new, keys, those that all share)
VOCABULARY = 151_936
SAMPLING_ROWS = (1, 32, 256)
SAMPLING: Mapping[str, tuple[int, float, float]] = MappingProxyType(  # top_k, top_p, min_p
    {
        "whole": (0, 1.0, 0.0),
        "top-k 50": (50, 1.0, 0.0),
        "top-p 0.95": (0, 0.95, 0.0),
        "min-p 0.05": (0, 1.0, 0.05),
    }
)
HIDDEN = 1024
# What the output head can choose without all logits (top_k, top_p), and whether it does.
HEADED = tuple(
    (how, (top_k, top_p, inside))
    for how, top_k, top_p in (("top-k 50", 50, 1.0), ("top-k 20, top-p 0.8", 20, 0.8))
    for inside in (False, True)
)
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
    flops_per_s: float  # in the dtype of the run
    int8_per_s: float  # operations on whole numbers; 0: not known

    def better(self, other: Limits) -> Limits:
        """The best of both, each by itself."""
        return Limits(
            max(self.bytes_per_s, other.bytes_per_s),
            max(self.flops_per_s, other.flops_per_s),
            max(self.int8_per_s, other.int8_per_s),
        )

    def seconds(self, size: float, work: float, *, rounded: bool = False) -> float:
        """The least time for so many bytes and operations."""
        return max(size / self.bytes_per_s, work / (self.int8_per_s if rounded else self.flops_per_s))


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
        computed = bench.dtype if multiplied else torch.float32
        before = measure_limits(bench, kernels, computed)
        points = {
            "linear": [linear_point(bench, kernels, n, k, m) for n, k in LINEAR_SIZES for m in ROWS],
            "rounded": [
                {"weights": name, **linear_point(bench, kernels, n, k, m, quantized)}
                for name, quantized in (ROUNDED.items() if before.int8_per_s else ())
                for n, k in ROUNDED_SIZES
                for m in ROWS
            ],
            "attention": [attention_point(bench, kernels, *shape) for shape in ATTENTION_SHAPES],
            "sampling": [sampling_point(bench, kernels, n, how) for n in SAMPLING_ROWS for how in SAMPLING],
            "head": [head_point(bench, kernels, n, how, *one) for n in SAMPLING_ROWS for how, one in HEADED],
        }
        limits = before.better(measure_limits(bench, kernels, computed))
    for kind, entries in points.items():
        for point in entries:
            least = limits.seconds(point.pop("bytes"), point.pop("work"), rounded=kind == "rounded")
            point["of_limit"] = round(least * 1e6 / point["us"], 3)
    return {
        "bench": "kernels",
        "version": trunkline.__version__,
        "device": options.device,
        "kernels": describe(kernels),
        "dtype": name,
        "threads": threads,
        "read_gb_per_s": round(limits.bytes_per_s / 1e9, 2),
        "peak_gflop_per_s": round(limits.flops_per_s / 1e9, 1),
        "peak_int8_gop_per_s": round(limits.int8_per_s / 1e9, 1),
        **points,
    }


def measure_limits(bench: Bench, kernels: Any, dtype: torch.dtype) -> Limits:
    """`dtype`: what the processor multiplies, which may be wider than what is stored."""
    import torch

    if hasattr(kernels, "limits"):
        found = kernels.limits(max(bench.seconds, 0.01))
        return Limits(found["read"], found[f"{8 * bench.dtype.itemsize} bits"], found["8 bits"])
    large = torch.ones(COLD_BYTES // 4, dtype=torch.float32, device=bench.device)
    read = bench.time(lambda _: large.sum())
    side = 1024
    a, b = bench.random(side, side).to(dtype), bench.random(side, side).to(dtype)
    return Limits(COLD_BYTES / read, 2 * side**3 / bench.time(lambda _: a @ b), 0.0)


def linear_point(
    bench: Bench, kernels: Any, n: int, k: int, m: int, quantized: Quantized | None = None
) -> dict[str, Any]:
    """One product of [m, k] by [k, n]. Different weights for each call."""
    from trunkline.kernels.ops import Quantization

    rounding = None if quantized is None else Quantization(*quantized)
    weight = bench.random(n, k)
    first = kernels.pack_linear([weight], [], rounding)
    copies = min(64, max(1, COLD_BYTES // first.nbytes))
    packed = [first] + [kernels.pack_linear([weight], [], rounding) for _ in range(copies - 1)]
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
        "bytes": moved,
        "work": work,
    }


def attention_point(
    bench: Bench, kernels: Any, requests: int, new: int, keys: int, shared: int
) -> dict[str, Any]:
    """Requests that each attend `new` last tokens over `keys` keys in pages, the first `shared` of which all
    have in common. Planning is timed apart."""
    import torch

    from trunkline.attention.backend import KVPool
    from trunkline.kernels.ops import PagedShape

    pages = -(-keys // PAGE)
    shape = PagedShape(HEADS, KV_HEADS, HEAD_DIM, PAGE, requests * pages * PAGE)
    pool = KVPool(1, shape, bench.dtype, bench.device).data[0]
    pool.copy_(bench.random(*pool.shape))
    table = torch.arange(requests * pages, dtype=torch.int32, device=bench.device).view(requests, pages)
    table[:, : shared // PAGE] = table[0, : shared // PAGE].clone()
    q_start = torch.arange(0, requests * new + 1, new, dtype=torch.int32, device=bench.device)
    lens = torch.full((requests,), keys, dtype=torch.int32, device=bench.device)
    q = bench.random(requests * new, HEADS, HEAD_DIM)
    plan = kernels.plan_attention(q_start, lens, table, None, shape)
    took = bench.time(lambda _: kernels.attention(q, pool, plan))
    planning = bench.time(lambda _: kernels.plan_attention(q_start, lens, table, None, shape))
    size = (requests * (keys - shared) + shared) * 2 * KV_HEADS * HEAD_DIM * pool.element_size()
    seen = new * keys - new * (new - 1) / 2  # (query, key) pairs of a causal request
    work = 4.0 * requests * seen * HEADS * HEAD_DIM
    return {
        "requests": requests,
        "new": new,
        "keys": keys,
        "shared": shared,
        "us": round(took * 1e6, 1),
        "plan_us": round(planning * 1e6, 1),
        "gb_per_s": round(size / took / 1e9, 2),
        "gflop_per_s": round(work / took / 1e9, 1),
        "bytes": size,
        "work": work,
    }


def choices_of(rows: int, top_k: int, top_p: float, min_p: float) -> Any:
    """Those of `rows` rows at temperature 1."""
    import torch

    from trunkline.kernels.ops import Choices

    return Choices(
        sharpness=torch.full((rows,), 1.442695),
        top_k=torch.full((rows,), top_k),
        top_p=torch.full((rows,), top_p, dtype=torch.float64),
        min_p=torch.full((rows,), min_p, dtype=torch.float64),
        u=torch.rand(rows, dtype=torch.float64),
    )


def sampling_point(bench: Bench, kernels: Any, rows: int, how: str) -> dict[str, Any]:
    """Rows of normally distributed logits. They are flatter than a trained model's: filters keep more of
    them."""
    import torch

    logits = torch.randn(rows, VOCABULARY, device=bench.device) * 3
    choices = choices_of(rows, *SAMPLING[how])
    took = bench.time(lambda _: kernels.choose(logits, choices))
    size = rows * VOCABULARY * 4
    return {
        "rows": rows,
        "how": how,
        "us": round(took * 1e6, 1),
        "gb_per_s": round(size / took / 1e9, 2),
        "gflop_per_s": 0.0,
        "bytes": size,
        "work": 0.0,
    }


def head_point(
    bench: Bench, kernels: Any, rows: int, how: str, top_k: int, top_p: float, inside: bool
) -> dict[str, Any]:
    """From hidden states to tokens: `inside` the product, or from its logits."""
    packed = kernels.pack_linear([bench.random(VOCABULARY, HIDDEN) / HIDDEN**0.5], [])
    x, choices = bench.random(rows, HIDDEN) * 3, choices_of(rows, top_k, top_p, 0.0)
    logits = kernels.linear(x, packed, wide=True)

    def from_logits() -> object:
        return kernels.choose(kernels.linear(x, packed, wide=True, out=logits), choices)

    took = bench.time(lambda _: kernels.top(x, packed, None, choices) if inside else from_logits())
    work = 2.0 * rows * VOCABULARY * HIDDEN
    return {
        "rows": rows,
        "how": how,
        "logits": "none" if inside else "written",
        "us": round(took * 1e6, 1),
        "gb_per_s": round(packed.nbytes / took / 1e9, 2),
        "gflop_per_s": round(work / took / 1e9, 1),
        "bytes": packed.nbytes,
        "work": work,
    }


def print_table(result: dict[str, Any]) -> None:
    print(f"{result['dtype']} on {result['device']} ({result['kernels']}), {result['threads']} threads")
    print(f"reads {result['read_gb_per_s']} GB/s, computes {result['peak_gflop_per_s']} GFLOP/s", end="")
    print(f" and {result['peak_int8_gop_per_s']} GOP/s on int8" * bool(result["rounded"]))
    for kind, names in (
        ("linear", ("n", "k", "m")),
        ("rounded", ("weights", "n", "k", "m")),
        ("attention", ("requests", "new", "keys", "shared")),
        ("sampling", ("rows", "how")),
        ("head", ("rows", "how", "logits")),
    ):
        columns = (*names, "us", "gb_per_s", "gflop_per_s", "of_limit")
        print(f"\n{kind}\n" + "".join(f"{c:>13}" for c in columns))
        for point in result[kind]:
            print("".join(f"{point[c]:>13}" for c in columns))
