"""Trunkline: a serving engine for language models. Importing it is cheap; torch loads with `Engine`.

The words of the language for programs (docs/language.md) are here too, and load with their first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from trunkline.engine.offline import Engine as Engine
    from trunkline.lang import *  # noqa: F403
    from trunkline.types import SamplingParams as SamplingParams


def __getattr__(name: str) -> Any:
    homes = {"Engine": "trunkline.engine.offline", "SamplingParams": "trunkline.types"}
    if name in homes:
        return getattr(import_module(homes[name]), name)
    if not name.startswith("__") or name == "__all__":
        lang = import_module("trunkline.lang")
        if name == "__all__":
            return ["__version__", *homes, *lang.__all__]
        if name in lang.__all__:
            return getattr(lang, name)
    raise AttributeError(f"module 'trunkline' has no attribute {name!r}")
