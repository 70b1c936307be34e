"""Trunkline: a serving engine for language models. Importing it is cheap; torch loads with `Engine`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Engine", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from trunkline.engine.offline import Engine
    from trunkline.types import SamplingParams


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from trunkline.engine.offline import Engine

        return Engine
    if name == "SamplingParams":
        from trunkline.types import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'trunkline' has no attribute {name!r}")
