"""Every kernel set that this machine runs: plain torch, and the native one on each instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from trunkline.kernels import ref
from trunkline.kernels.cpu import ops as native
from trunkline.kernels.ops import Kernels

NATIVE = [f"native-{isa}" for isa in native.isas()]


@pytest.fixture(params=["ref", *NATIVE])
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """A kernel set; instruction sets that this machine lacks are covered on the next one."""
    if request.param == "ref":
        yield ref
        return
    native.select_isa(request.param.removeprefix("native-"))
    yield native
    native.select_isa(native.isas()[0])


@pytest.fixture(params=NATIVE)
def native_kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    native.select_isa(request.param.removeprefix("native-"))
    yield native
    native.select_isa(native.isas()[0])


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)
