"""The only place with kernels: `ops` is the contract, `ref` implements it in plain torch, `cpu` in C++."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from trunkline.kernels.ops import Kernels

_log = logging.getLogger(__name__)


def load_kernels(device: torch.device) -> Kernels:
    """The implementation for a device: `cpu` on a CPU where it was built, else `ref`, which runs on all."""
    if device.type == "cpu":
        try:
            from trunkline.kernels.cpu import ops

            return ops
        except ImportError as error:
            _log.warning("CPU kernels can't be loaded, plain torch runs instead: %s", error)
    from trunkline.kernels import ref

    return ref


def describe(kernels: Kernels) -> str:
    """Which implementation this is, for people: "native, avx2" or "torch"."""
    isa = getattr(kernels, "isa", None)
    return "torch" if isa is None else f"native, {isa()}"
