"""Session fixtures: each tiny checkpoint is made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.model.checkpoints import make_checkpoint

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
