"""A language for programs that call a model: text, generations and choices, in branches that share their
prefix.

SGLang's frontend language (Zheng et al. 2023, arXiv:2312.07104), its names and meaning. Never loads torch
itself."""

from trunkline.lang.api import (
    assistant,
    assistant_begin,
    assistant_end,
    flush_cache,
    function,
    gen,
    gen_int,
    gen_string,
    get_server_info,
    image,
    select,
    separate_reasoning,
    set_default_backend,
    system,
    system_begin,
    system_end,
    user,
    user_begin,
    user_end,
    video,
)
from trunkline.lang.backends.anthropic import Anthropic
from trunkline.lang.backends.openai import OpenAI
from trunkline.lang.backends.runtime import Runtime
from trunkline.lang.backends.runtime_endpoint import RuntimeEndpoint
from trunkline.lang.choices import (
    greedy_token_selection,
    token_length_normalized,
    unconditional_likelihood_normalized,
)
from trunkline.lang.global_config import global_config

__all__ = [
    "Anthropic",
    "OpenAI",
    "Runtime",
    "RuntimeEndpoint",
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
