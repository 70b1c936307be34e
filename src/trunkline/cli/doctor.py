"""`trunkline doctor`: would `trunkline serve` start here, with these flags? If not, what to do."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import trunkline
from trunkline.cli.serve import check_port
from trunkline.config.cli import help_text, parse, wants_help
from trunkline.config.flags import Args
from trunkline.config.hardware import Hardware, detect, installed
from trunkline.config.memory import show
from trunkline.config.resolve import load_config
from trunkline.types import RequestError

ABOUT = (
    "Look at this machine and say what is there, what is missing and what to do. Takes the flags of "
    "`trunkline serve` and tells whether it would start with them. Exit status 1 if it would not."
)
PYTHON = ((3, 11), (3, 14))  # from, below
TORCH = ((2, 11), (2, 15))
REQUIRED = (
    "torch", "safetensors", "tokenizers", "jinja2", "msgspec", "pyzmq", "starlette", "uvicorn", "uvloop",
    "httptools", "prometheus_client", "huggingface_hub", "tqdm", "psutil",
)  # fmt: skip
_MIN_FILES = 1024


@dataclass(frozen=True)
class Finding:
    """One line of the report. `advice` says what to do about a fault or a warning."""

    level: Literal["ok", "note", "fault"]
    subject: str
    found: str
    advice: str = ""


def run(words: list[str]) -> int:
    if wants_help(words):
        sys.stdout.write(help_text("trunkline doctor [FLAGS]", ABOUT, Args))
        return 0
    args = parse(words, Args)
    hardware = detect()
    faults = 0
    for finding in (*software(), *machine(hardware), *start(args)):
        mark = {"ok": "ok   ", "note": "note ", "fault": "FAULT"}[finding.level]
        print(f"{mark}  {finding.subject:<9}  {finding.found}")
        if finding.advice:
            print(f"{'':18}-> {finding.advice}")
        faults += finding.level == "fault"
    print(f"\n{faults} fault{'s' * (faults != 1)} found." if faults else "\n`trunkline serve` can start.")
    return 1 if faults else 0


def software() -> Iterator[Finding]:
    """Python, torch and the packages."""
    version = sys.version_info[:2]
    here = f"{sys.version.split()[0]} at {sys.executable}"
    if PYTHON[0] <= version < PYTHON[1]:
        yield Finding("ok", "python", here)
    else:
        yield Finding("fault", "python", here, "use Python 3.11, 3.12 or 3.13")
    yield Finding("ok", "trunkline", f"{trunkline.__version__} in {trunkline.__path__[0]}")
    yield torch_finding(installed("torch"))
    missing = [name for name in REQUIRED if name != "torch" and installed(name) is None]
    if missing:
        yield Finding(
            "fault", "packages", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}"
        )
    else:
        yield Finding("ok", "packages", f"all {len(REQUIRED)} are there")


def torch_finding(version: str | None) -> Finding:
    """Whether this torch is there and in the range that is tested."""
    if version is None:
        return Finding("fault", "torch", "not installed", "pip install torch (CPU: the index of CPU wheels)")
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if TORCH[0] <= release < TORCH[1]:
        return Finding("ok", "torch", version)
    return Finding("fault", "torch", version, 'pip install "torch>=2.11,<2.15": others are not tested')


def kernels(hardware: Hardware) -> Finding:
    """Which kernels compute on this CPU, found by loading them, and whether bfloat16 is fast."""
    if hardware.torch_version is None:
        return Finding("note", "kernels", "not looked at: torch is missing")
    import torch

    from trunkline.kernels import describe, load_kernels

    name = describe(load_kernels(torch.device("cpu")))
    if name == "torch":
        how = "in bfloat16 too" if hardware.fast_bfloat16 else "in float32: this CPU has no bfloat16 products"
        advice = "install the package anew with a C++ compiler at hand; native kernels run on every CPU"
        return Finding("note", "kernels", f"plain torch operations, {how}", advice)
    how = "multiplied" if name.endswith("bf16") else "widened as it is read"
    return Finding("ok", "kernels", f"{name}; bfloat16 is {how}")


def machine(hardware: Hardware) -> Iterator[Finding]:
    """Processor, memory, GPU, limits."""
    flags = " ".join(hardware.cpu_flags) or "no vector instructions that are known"
    yield Finding("ok", "cpu", f"{hardware.cpu_name}, {hardware.cores} usable cores, {flags}")
    yield kernels(hardware)
    memory = (
        f"{show(hardware.available_bytes)} free of {show(hardware.total_bytes)} ({hardware.memory_limit})"
    )
    yield Finding("ok", "memory", memory)
    for gpu in hardware.gpus:
        what = (
            f"{gpu.name}, {show(gpu.free_bytes)} free of {show(gpu.total_bytes)}, capability {gpu.capability}"
        )
        if hardware.cuda:
            yield Finding("ok", "gpu", what)
        else:
            yield Finding("note", "gpu", what, "torch is a CPU build: install one with CUDA to use the GPU")
    if not hardware.gpus:
        yield Finding("note", "gpu", "none that nvidia-smi shows: the CPU computes")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files < _MIN_FILES:
        yield Finding("note", "files", f"{files} may be open at once", "ulimit -n 65536 for many clients")


def start(args: Args) -> Iterator[Finding]:
    """The port, the model folder and the memory plan, with the flags given."""
    try:
        check_port(args.host, args.port)
        yield Finding("ok", "port", f"{args.host}:{args.port} is free")
    except RequestError as error:
        yield Finding("fault", "port", error.message)
    try:
        resolved = load_config(args)
    except RequestError as error:
        yield Finding("fault", "model", error.message)
        return
    model, plan = resolved.config.model, resolved.memory
    yield Finding("ok", "model", f"{model.served_model_name}: {model.dtype} on {model.device}")
    yield Finding("ok", "plan", f"{show(plan.needed)} of {show(plan.available)} available\n{plan.table()}")
