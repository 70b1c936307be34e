"""What this machine offers, found without torch: cores, memory, CPU instructions, NVIDIA GPUs."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import msgspec

# Instruction sets that decide a choice or that `trunkline doctor` reports, as Linux names them.
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
_FAST_BF16 = frozenset({"avx512_bf16", "amx_bf16"})
_NO_LIMIT = 1 << 60  # cgroup v1 writes a number near 2^63 for "none"


class Gpu(msgspec.Struct, frozen=True):
    """One NVIDIA GPU. Memory in bytes; compute capability such as 9.0."""

    name: str
    total_bytes: int
    free_bytes: int
    capability: float


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """A machine as this process may use it: container limits are taken into account."""

    cpu_name: str = "unknown"
    cores: int = 1
    cpu_flags: tuple[str, ...] = ()
    total_bytes: int = 0  # memory that the process may use in all
    available_bytes: int = 0  # of that, free now
    memory_limit: str = "the machine"  # what sets total_bytes
    gpus: tuple[Gpu, ...] = ()
    torch_version: str | None = None
    threads_wanted: int | None = None  # OMP_NUM_THREADS
    native_kernels: bool = False  # the package has its C++ kernels, which run on every CPU

    @property
    def fast_bfloat16(self) -> bool:
        """Whether the CPU multiplies bfloat16 itself, so that it is faster than float32."""
        return bool(_FAST_BF16.intersection(self.cpu_flags))

    @property
    def packs_bfloat16(self) -> bool:
        """Whether matrix products on this CPU take bfloat16 at all: torch's need AVX-512."""
        return self.native_kernels or "avx512f" in self.cpu_flags

    @property
    def cuda(self) -> bool:
        """A GPU that the installed torch can use."""
        return bool(self.gpus) and self.torch_version is not None and "+cpu" not in self.torch_version


def detect() -> Hardware:
    """Look at this machine. Never fails: what cannot be found out is left at "none" or zero."""
    name, flags = parse_cpuinfo(_read(Path("/proc/cpuinfo")))
    total, available = parse_meminfo(_read(Path("/proc/meminfo")))
    where = "the machine"
    group = _group_memory()
    if group is not None and group[0] < total:
        total, available = group[0], min(available, group[0] - group[1])
        where = "the container"
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return Hardware(
        cpu_name=name,
        cores=_cores(),
        cpu_flags=flags,
        total_bytes=total,
        available_bytes=max(available, 0),
        memory_limit=where,
        gpus=_gpus(),
        torch_version=installed("torch"),
        threads_wanted=int(wanted) if wanted.isdigit() and int(wanted) > 0 else None,
        native_kernels=importlib.util.find_spec("trunkline.kernels.cpu.native") is not None,
    )


def share_cores() -> None:
    """Let idle OpenMP threads of this process, and those it starts, sleep after some 50 microseconds.

    The runtime's own default is to spin for milliseconds, which on a machine that does anything else costs up
    to 10 times the speed (measured with two busy cores). To sleep at once costs a batch of one 12 % of its
    speed, as each operation then wakes the others. Works before torch is loaded; the user's own
    OMP_WAIT_POLICY or GOMP_SPINCOUNT prevails.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "6000")


def installed(package: str) -> str | None:
    """Version of an installed distribution, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def parse_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """Model name and the known instruction sets of /proc/cpuinfo."""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(flags.group(1).split()) if flags else set()
    return name.group(1).strip() if name else "unknown", tuple(f for f in CPU_FLAGS if f in present)


def parse_meminfo(text: str) -> tuple[int, int]:
    """(total, available) bytes of /proc/meminfo."""
    sizes = {key: int(kib) * 1024 for key, kib in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    return sizes.get("MemTotal", 0), sizes.get("MemAvailable", 0)


def parse_nvidia_smi(text: str) -> tuple[Gpu, ...]:
    """GPUs of `nvidia-smi --query-gpu=name,memory.total,memory.free,compute_cap` as bare CSV (in MiB)."""
    gpus = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.rsplit(",", 3)]
        try:
            total, free, capability = int(parts[1]) << 20, int(parts[2]) << 20, float(parts[3])
        except (IndexError, ValueError):
            continue  # a GPU without memory of its own reports "[N/A]"
        gpus.append(Gpu(parts[0], total, free, capability))
    return tuple(gpus)


def group_memory(read: Callable[[Path], str], groups: str) -> tuple[int, int] | None:
    """(limit, used) bytes of the tightest control group that this process is in, or None.

    `groups` is /proc/self/cgroup. Version 2 has one line `0::/path`; version 1 one line for each controller.
    Page cache that can be dropped does not count as used.
    """
    tightest: tuple[int, int] | None = None
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, cache_key = "/sys/fs/cgroup", "inactive_file"
            limit_file, used_file = "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, cache_key = "/sys/fs/cgroup/memory", "total_inactive_file"
            limit_file, used_file = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = Path(root + path)
        for folder in (own, *own.parents):  # a parent's limit holds too
            limit, used = read(folder / limit_file).strip(), read(folder / used_file).strip()
            if limit.isdigit() and used.isdigit() and int(limit) < _NO_LIMIT:
                cached = re.search(rf"^{cache_key} (\d+)$", read(folder / "memory.stat"), re.MULTILINE)
                found = int(limit), max(0, int(used) - (int(cached.group(1)) if cached else 0))
                if tightest is None or found[0] - found[1] < tightest[0] - tightest[1]:
                    tightest = found
            if str(folder) == root:
                break
    return tightest


def quota_cores(text: str) -> int | None:
    """Cores of a cgroup v2 `cpu.max` ("200000 100000" is 2), at least 1, or None without a limit."""
    parts = text.split()
    if len(parts) != 2 or not (parts[0].isdigit() and parts[1].isdigit()) or int(parts[1]) == 0:
        return None
    return max(1, int(parts[0]) // int(parts[1]))


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _group_memory() -> tuple[int, int] | None:
    return group_memory(_read, _read(Path("/proc/self/cgroup")))


def _cores() -> int:
    """Cores that this process may use: its affinity and a container's quota, hyper-threads counted once."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    physical = {
        _read(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")) or str(cpu)
        for cpu in allowed
    }
    quota = quota_cores(_read(Path("/sys/fs/cgroup/cpu.max")))
    return max(1, min(len(physical), quota or len(physical)))


def _gpus() -> tuple[Gpu, ...]:
    """Visible NVIDIA GPUs. CUDA_VISIBLE_DEVICES hides or reorders them as it does for CUDA (by index)."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = ["--query-gpu=name,memory.total,memory.free,compute_cap", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run([program, *query], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    gpus = parse_nvidia_smi(done.stdout) if done.returncode == 0 else ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return gpus
    indices = [part.strip() for part in visible.split(",")]
    if all(index.isdigit() for index in indices):
        return tuple(gpus[int(index)] for index in indices if int(index) < len(gpus))
    return gpus if any(indices) and indices[0] != "-1" else ()  # ids by name: order unknown, presence is not
