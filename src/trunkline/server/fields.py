"""The fields of each OpenAI-compatible route, as data (see `engine/fields.py`; /generate has its table in
`engine/native.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trunkline.engine.constraint import GRAMMAR_FIELDS, ResponseFormat
from trunkline.engine.fields import (
    INT32_MAX,
    SAMPLING_FIELDS,
    Flag,
    Items,
    Number,
    Object,
    OneOf,
    Rule,
    Text,
    Unsupported,
    read_fields,
    wrong_type,
)
from trunkline.engine.native import MAX_THINKING, Prompts
from trunkline.server.tools.choice import ToolChoice
from trunkline.types import MAX_TOP_LOGPROBS, RequestError

ANY_LENGTH = 2**31  # the limit on the body bounds it
MAX_MESSAGES = 16384
MAX_TOOLS = 1024

# Name in these interfaces -> name in SamplingParams; others are equal.
TO_SAMPLING: Mapping[str, str] = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
}

_HONORED_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
    "logit_bias", "stop", "stop_regex", "stop_token_ids", "ignore_eos", "n", "skip_special_tokens",
    "spaces_between_special_tokens", "no_stop_trim", "stream_interval",
)  # fmt: skip
_OUTPUT_TOKENS = Number(0, INT32_MAX, integer=True)


@dataclass(frozen=True)
class Content(Rule):
    """Text, or a list of text parts, which is joined by newlines."""

    def read(self, value: Any, name: str) -> str:
        if isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise wrong_type(name, "a string or a list of parts", value)
        return "\n".join(self._part(part, f"{name}[{i}]") for i, part in enumerate(value))

    @staticmethod
    def _part(part: Any, name: str) -> str:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind is None:
            raise wrong_type(name, 'a part such as {"type": "text", "text": "..."}', part)
        if kind != "text":
            raise RequestError(
                f"{name}.type: parts of this type are not supported, this server takes text only",
                code="unsupported_field",
                param=f"{name}.type",
            )
        text: str = read_fields({"type": Text(), "text": Text(ANY_LENGTH)}, part, f"{name}.").get("text", "")
        return text


_TOOL_CALL = Object(
    {
        "id": Text(),
        "type": OneOf(("function",)),
        "index": Number(0, integer=True),
        "function": Object({"name": Text(), "arguments": Text(ANY_LENGTH)}),
    }
)
_MESSAGE = Object(
    {
        "role": OneOf(("system", "developer", "user", "assistant", "tool")),
        "content": Content(),
        "name": Text(),
        "tool_calls": Items(_TOOL_CALL, MAX_TOOLS),
        "tool_call_id": Text(),
        "reasoning_content": Text(ANY_LENGTH),
        "refusal": Unsupported(),
        "audio": Unsupported(),
        "function_call": Unsupported(),
        "annotations": Unsupported(([],)),
    }
)
TOOL = Object(
    {
        "type": OneOf(("function",)),
        "function": Object(
            {
                "name": Text(shortest=1),
                "description": Text(ANY_LENGTH),
                "parameters": Object(),
                "strict": Flag(),
            }
        ),
    }
)

DETAILS = ("return_token_ids", "return_prompt_token_ids", "return_meta_info")

_UNSUPPORTED: Mapping[str, Rule] = {
    "custom_params": SAMPLING_FIELDS["custom_params"],
    "lora_path": Unsupported(),
    "session_id": Unsupported(),
    "session_params": Unsupported(),
    "custom_logit_processor": Unsupported((), "it would run code of the request; use logit_bias"),
    "return_hidden_states": Unsupported((False,)),
    "return_routed_experts": Unsupported((False,)),
    "return_cached_tokens_details": Unsupported((False,)),
    "return_spec_tokens_details": Unsupported((False,)),
    "data_parallel_rank": Unsupported(),
    "routed_dp_rank": Unsupported(),
    "bootstrap_host": Unsupported(),
    "bootstrap_port": Unsupported(),
    "bootstrap_room": Unsupported(),
    "metadata": Unsupported(({},)),
    "store": Unsupported((False,)),
    "service_tier": Unsupported(("auto", "default")),
}

_COMMON: Mapping[str, Rule] = {
    "model": Text(),
    **{name: SAMPLING_FIELDS[name] for name in _HONORED_SAMPLING},
    "max_tokens": _OUTPUT_TOKENS,
    "min_tokens": SAMPLING_FIELDS["min_new_tokens"],
    "seed": SAMPLING_FIELDS["sampling_seed"],
    "stream": Flag(),
    "stream_options": Object(
        {
            "include_usage": Flag(),
            "continuous_usage_stats": Unsupported((False,)),
            "include_obfuscation": Unsupported((False,)),
        }
    ),
    "rid": Text(longest=256, shortest=1),
    "priority": Number(-INT32_MAX, INT32_MAX, integer=True),
    "extra_key": Text(),
    "cache_salt": Text(),
    "return_prefix_miss": Flag(),
    **dict.fromkeys(DETAILS, Flag()),
    "response_format": ResponseFormat(),
    "regex": GRAMMAR_FIELDS["regex"],
    "ebnf": GRAMMAR_FIELDS["ebnf"],
    "user": Text(),  # names of the caller: they change nothing, by definition
    "safety_identifier": Text(),
    "prompt_cache_key": Text(),
    **_UNSUPPORTED,
}

CHAT_FIELDS: Mapping[str, Rule] = {
    **_COMMON,
    "messages": Items(_MESSAGE, MAX_MESSAGES, fewest=1),
    "max_completion_tokens": _OUTPUT_TOKENS,
    "logprobs": Flag(),
    "top_logprobs": Number(0, MAX_TOP_LOGPROBS, integer=True),
    "tools": Items(TOOL, MAX_TOOLS),
    "tool_choice": ToolChoice(),
    "parallel_tool_calls": Flag(),
    "chat_template_kwargs": Object(),
    "continue_final_message": Flag(),
    "reasoning_effort": Text(),
    "separate_reasoning": Flag(),
    "stream_reasoning": Flag(),
    "thinking": Unsupported((False,), "use chat_template_kwargs"),
    "max_thinking_tokens": MAX_THINKING,
    "input_ids": Unsupported((), "use /generate"),
    "functions": Unsupported((), "use tools"),
    "function_call": Unsupported((), "use tools"),
    "modalities": Unsupported((["text"],)),
    "audio": Unsupported(),
    "prediction": Unsupported(),
    "web_search_options": Unsupported(),
    "verbosity": Unsupported(),
    "prompt_cache_retention": Unsupported(),
}

COMPLETION_FIELDS: Mapping[str, Rule] = {
    **_COMMON,
    "prompt": Prompts(texts=True, ids=True),
    "echo": Flag(),
    "logprobs": Number(0, MAX_TOP_LOGPROBS, integer=True),
    "suffix": Unsupported(("",)),
    "best_of": Unsupported((1,), "use n"),
    "json_schema": GRAMMAR_FIELDS["json_schema"],
}

TOKENIZE_FIELDS: Mapping[str, Rule] = {
    "model": Text(),
    "prompt": Text(ANY_LENGTH),
    "text": Text(ANY_LENGTH),
    "add_special_tokens": Flag(),
}
DETOKENIZE_FIELDS: Mapping[str, Rule] = {
    "model": Text(),
    "tokens": Items(Number(0, INT32_MAX, integer=True), ANY_LENGTH),
    "skip_special_tokens": Flag(),
}
PAUSE_FIELDS: Mapping[str, Rule] = {"mode": OneOf(("abort", "retract", "in_place"))}
ABORT_FIELDS: Mapping[str, Rule] = {
    "rid": Text(longest=256),
    "abort_all": Flag(),
    "abort_message": Unsupported(("",)),
}
