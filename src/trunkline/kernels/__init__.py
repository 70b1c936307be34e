"""The only place with kernels: `ops` is the typed contract, `ref` implements it in plain torch."""

from __future__ import annotations

from trunkline.kernels import ref
from trunkline.kernels.ops import Kernels


def load_kernels() -> Kernels:
    """The implementation to use. `ref` runs on every device."""
    return ref
