"""Hardware detection, from what the system's files and programs say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trunkline.config import hardware
from trunkline.config.hardware import (
    Gpu,
    Hardware,
    detect,
    group_memory,
    installed,
    parse_cpuinfo,
    parse_meminfo,
    parse_nvidia_smi,
    quota_cores,
    share_cores,
)

GIB = 1 << 30


def test_this_machine_is_found() -> None:
    found = detect()
    assert found.cores >= 1 and 0 < found.available_bytes <= found.total_bytes
    assert found.torch_version == installed("torch")


def test_cpuinfo() -> None:
    text = "processor\t: 0\nmodel name\t: Some CPU @ 2GHz\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile\n"
    assert parse_cpuinfo(text) == ("Some CPU @ 2GHz", ("avx2", "avx512f", "avx512_bf16"))
    assert parse_cpuinfo("") == ("unknown", ())
    assert Hardware(cpu_flags=("avx512f",)).packs_bfloat16
    assert not Hardware(cpu_flags=("avx512f",)).fast_bfloat16
    assert Hardware(cpu_flags=("amx_bf16",)).fast_bfloat16


def test_meminfo() -> None:
    assert parse_meminfo("MemTotal:   100 kB\nMemFree: 3 kB\nMemAvailable:  50 kB\n") == (102400, 51200)
    assert parse_meminfo("") == (0, 0)


def test_nvidia_smi() -> None:
    text = "NVIDIA H200, 143771, 143000, 9.0\nOdd, name, 16384, 100, 7.5\nNVIDIA GB10, [N/A], [N/A], 12.1\n"
    assert parse_nvidia_smi(text) == (
        Gpu("NVIDIA H200", 143771 << 20, 143000 << 20, 9.0),
        Gpu("Odd, name", 16384 << 20, 100 << 20, 7.5),
    )
    assert parse_nvidia_smi("No devices were found\n") == ()


@pytest.mark.parametrize(
    ("text", "cores"), [("200000 100000\n", 2), ("50000 100000", 1), ("max 100000", None), ("", None)]
)  # fmt: skip
def test_quota(text: str, cores: int | None) -> None:
    assert quota_cores(text) == cores


def test_a_container_limit_is_found_in_version_2() -> None:
    files = {
        "/sys/fs/cgroup/a/b/memory.max": "max",
        "/sys/fs/cgroup/a/memory.max": str(4 * GIB),
        "/sys/fs/cgroup/a/memory.current": str(3 * GIB),
        "/sys/fs/cgroup/a/memory.stat": f"anon 5\ninactive_file {GIB}\n",
        "/sys/fs/cgroup/memory.max": str(64 * GIB),
        "/sys/fs/cgroup/memory.current": str(GIB),
    }
    assert group_memory(lambda path: files.get(str(path), ""), "0::/a/b\n") == (4 * GIB, 2 * GIB)
    assert group_memory(lambda path: "", "0::/a/b\n") is None


def test_a_container_limit_is_found_in_version_1() -> None:
    folder = "/sys/fs/cgroup/memory"
    files = {
        f"{folder}/memory.limit_in_bytes": str(2 * GIB),
        f"{folder}/memory.usage_in_bytes": str(GIB),
        f"{folder}/docker/x/memory.limit_in_bytes": str((1 << 63) - 4096),
        f"{folder}/docker/x/memory.usage_in_bytes": "5",
    }
    groups = "5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n"
    assert group_memory(lambda path: files.get(str(path), ""), groups) == (2 * GIB, GIB)


def test_detection_takes_the_container_and_the_environment_into_account(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n",
        "/proc/self/cgroup": "0::/\n",
        "/sys/fs/cgroup/memory.max": str(4 * GIB),
        "/sys/fs/cgroup/memory.current": str(GIB),
        "/sys/fs/cgroup/cpu.max": "100000 100000",
    }
    monkeypatch.setattr(hardware, "_read", lambda path: files.get(str(path), ""))
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    found = detect()
    assert (found.total_bytes, found.available_bytes) == (4 * GIB, 3 * GIB)
    assert (found.memory_limit, found.cores, found.threads_wanted) == ("the container", 1, 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert detect().threads_wanted is None


@pytest.mark.parametrize(
    ("visible", "names"), [(None, "AB"), ("1", "B"), ("1,0", "BA"), ("", ""), ("-1", ""), ("GPU-3f", "AB")]
)  # fmt: skip
def test_gpus_that_the_environment_hides_are_not_there(
    visible: str | None, names: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'A, 100, 50, 9.0'\necho 'B, 100, 50, 9.0'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert "".join(gpu.name for gpu in detect().gpus) == names


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "6000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_idle_threads_sleep_unless_the_user_says_otherwise(
    given: dict[str, str], spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    share_cores()
    assert os.environ.get("GOMP_SPINCOUNT") == spins
