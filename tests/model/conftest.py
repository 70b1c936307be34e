"""Session fixtures: each tiny checkpoint is made once. `kernel_set` runs a module on every set of kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.model.checkpoints import make_checkpoint
from trunkline.kernels import ref
from trunkline.kernels.cpu import ops as native
from trunkline.kernels.ops import Kernels

Checkpoints = Callable[[str], tuple[Path, PreTrainedModel]]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Folder and transformers model of a family, by name."""
    made: dict[str, tuple[Path, PreTrainedModel]] = {}

    def get(name: str) -> tuple[Path, PreTrainedModel]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = folder, make_checkpoint(name, folder)
        return made[name]

    return get


@pytest.fixture(scope="module", params=["ref", *(f"native-{isa}" for isa in native.isas())])
def kernel_set(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """What workers use meanwhile: plain torch, or the native kernels on one instruction set."""
    chosen: Kernels = ref if request.param == "ref" else native
    if chosen is native:
        native.select_isa(request.param.removeprefix("native-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trunkline.worker.runner.load_kernels", lambda device: chosen)
        yield chosen
    native.select_isa(native.isas()[0])
