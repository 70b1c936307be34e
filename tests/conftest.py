"""Fixtures that several suites share."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from trunkline.cli.make_model import make_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-layer Qwen3 with random weights and a tokenizer. Read-only: suites share it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_model("tiny", folder)
    return folder


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    """Tiny tensors are slower on many threads. Suites that never import torch do not pay for it."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture
def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on."""
    return find_free_port()


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
