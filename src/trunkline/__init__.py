"""Trunkline: a serving engine for language models. Importing it is cheap; torch loads with `Engine`.

The words of the language for programs (docs/language.md) are here too, and load with their first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Anthropic",
    "Engine",
    "OpenAI",
    "Runtime",
    "RuntimeEndpoint",
    "SamplingParams",
    "__version__",
    "assistant",
    "assistant_begin",
    "assistant_end",
    "flush_cache",
    "function",
    "gen",
    "gen_int",
    "gen_string",
    "get_server_info",
    "global_config",
    "greedy_token_selection",
    "image",
    "select",
    "separate_reasoning",
    "set_default_backend",
    "system",
    "system_begin",
    "system_end",
    "token_length_normalized",
    "unconditional_likelihood_normalized",
    "user",
    "user_begin",
    "user_end",
    "video",
]

if TYPE_CHECKING:
    from trunkline.engine.offline import Engine
    from trunkline.lang import (
        Anthropic,
        OpenAI,
        Runtime,
        RuntimeEndpoint,
        assistant,
        assistant_begin,
        assistant_end,
        flush_cache,
        function,
        gen,
        gen_int,
        gen_string,
        get_server_info,
        global_config,
        greedy_token_selection,
        image,
        select,
        separate_reasoning,
        set_default_backend,
        system,
        system_begin,
        system_end,
        token_length_normalized,
        unconditional_likelihood_normalized,
        user,
        user_begin,
        user_end,
        video,
    )
    from trunkline.types import SamplingParams


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'trunkline' has no attribute {name!r}")
    home = {"Engine": "trunkline.engine.offline", "SamplingParams": "trunkline.types"}
    return getattr(import_module(home.get(name, "trunkline.lang")), name)
