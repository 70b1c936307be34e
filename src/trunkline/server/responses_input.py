"""What a Responses request says, in terms of a chat request: items to messages, tools, formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trunkline.engine.fields import (
    SAMPLING_FIELDS,
    Flag,
    Items,
    Object,
    OneOf,
    Rule,
    Text,
    Unsupported,
    read_fields,
    wrong_type,
)
from trunkline.server.call import Json
from trunkline.server.fields import ANY_LENGTH, CHAT_FIELDS, MAX_MESSAGES, MAX_TOOLS
from trunkline.types import RequestError

MAX_PAIRS, MAX_KEY, MAX_VALUE = 16, 64, 512  # of metadata; OpenAI's own bounds
LOGPROBS = "message.output_text.logprobs"


@dataclass(frozen=True)
class Metadata(Rule):
    """At most 16 pairs of short strings."""

    def read(self, value: Any, name: str) -> dict[str, str]:
        if not isinstance(value, dict):
            raise wrong_type(name, "an object", value)
        if len(value) > MAX_PAIRS:
            raise RequestError(
                f"{name} has {len(value)} entries; it may have {MAX_PAIRS}", code="out_of_range", param=name
            )
        for key, entry in value.items():
            Text(MAX_KEY).read(key, f"a key of {name}")
            Text(MAX_VALUE).read(entry, f"{name}.{key[:MAX_KEY]}")
        return value


@dataclass(frozen=True)
class Input(Rule):
    """A text, or a list of items."""

    def read(self, value: Any, name: str) -> list[Json]:
        if isinstance(value, str):
            return [{"type": "message", "role": "user", "content": value}]
        if not isinstance(value, list):
            raise wrong_type(name, "a string or a list of items", value)
        items: list[Json] = Items(_Item(), MAX_MESSAGES, fewest=1).read(value, name)
        return items


@dataclass(frozen=True)
class Parts(Rule):
    """Text, or a list of text parts."""

    def read(self, value: Any, name: str) -> str:
        if isinstance(value, str):
            return value
        parts: list[str] = Items(_Part(), MAX_MESSAGES).read(value, name)
        return "\n".join(parts)


@dataclass(frozen=True)
class _Part(Rule):
    def read(self, value: Any, name: str) -> str:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind is None:
            raise wrong_type(name, 'a part such as {"type": "input_text", "text": "..."}', value)
        if kind == "refusal":
            refusal: str = read_fields({"type": Text(), "refusal": Text(ANY_LENGTH)}, value, f"{name}.")[
                "refusal"
            ]
            return refusal
        if kind not in _TEXT_PARTS:
            raise RequestError(
                f"{name}.type: parts of this type are not supported, this server takes text only",
                code="unsupported_field",
                param=f"{name}.type",
            )
        text: str = read_fields(_PART, value, f"{name}.").get("text", "")
        return text


_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
_PART: Mapping[str, Rule] = {
    "type": Text(),
    "text": Text(ANY_LENGTH),
    **dict.fromkeys(("annotations", "logprobs"), Rule()),  # of an output that comes back
}
_SHARED: Mapping[str, Rule] = {"type": Text(), "id": Text(), "status": Text()}
_ITEMS: Mapping[str, Mapping[str, Rule]] = {
    "message": {
        **_SHARED,
        "role": OneOf(("system", "developer", "user", "assistant")),
        "content": Parts(),
        "phase": Unsupported(),
    },
    "function_call": {
        **_SHARED,
        "call_id": Text(shortest=1),
        "name": Text(shortest=1),
        "arguments": Text(ANY_LENGTH),
        "namespace": Unsupported(),
    },
    "function_call_output": {**_SHARED, "call_id": Text(shortest=1), "output": Parts()},
    "reasoning": {**_SHARED, "summary": Parts(), "content": Parts(), "encrypted_content": Unsupported()},
    "item_reference": {**_SHARED, "id": Text(shortest=1)},
}
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "item_reference": ("id",),
}


@dataclass(frozen=True)
class _Item(Rule):
    """One item, its content as text. One without a type is a message, or else a reference."""

    def read(self, value: Any, name: str) -> Json:
        if not isinstance(value, dict):
            raise wrong_type(name, "an object", value)
        kind = value.get("type") or ("message" if "role" in value else "item_reference")
        table = _ITEMS.get(kind) if isinstance(kind, str) else None
        if table is None:
            raise RequestError(
                f"{name}.type: items of this type are not supported (known: {', '.join(_ITEMS)})",
                code="unsupported_field",
                param=f"{name}.type",
            )
        item = read_fields(table, value, f"{name}.")
        missing = next((field for field in _NEEDED.get(kind, ()) if field not in item), None)
        if missing is not None:
            raise RequestError(
                f"{name}.{missing} is missing", code="missing_field", param=f"{name}.{missing}"
            )
        return {**item, "type": kind}


@dataclass(frozen=True)
class ToolChoice(Rule):
    """none, auto, required, or one function."""

    def read(self, value: Any, name: str) -> Any:
        if isinstance(value, dict):
            table = {"type": OneOf(("function",)), "name": Text(shortest=1)}
            chosen = read_fields(table, value, f"{name}.")
            if "name" not in chosen:
                raise RequestError(f"{name}.name is missing", code="missing_field", param=f"{name}.name")
            return {"type": "function", "function": {"name": chosen["name"]}}
        return OneOf(("none", "auto", "required")).read(value, name)


@dataclass(frozen=True)
class _Format(Rule):
    """What `text.format` asks for, as a chat request's response_format."""

    def read(self, value: Any, name: str) -> Json:
        if not isinstance(value, dict):
            raise wrong_type(name, "an object", value)
        table: dict[str, Rule] = {"type": OneOf(("text", "json_object", "json_schema"))}
        if value.get("type") == "json_schema":
            table |= {"name": Text(), "description": Text(ANY_LENGTH), "schema": Object(), "strict": Flag()}
        asked = read_fields(table, value, f"{name}.")
        if "type" not in asked:
            raise RequestError(f"{name}.type is missing", code="missing_field", param=f"{name}.type")
        kind = asked.pop("type")
        return {"type": kind, "json_schema": asked} if kind == "json_schema" else {"type": kind}


_TOOL = Object(
    {
        "type": OneOf(("function",)),
        "name": Text(shortest=1),
        "description": Text(ANY_LENGTH),
        "parameters": Object(),
        "strict": Flag(),
    }
)
_FROM_CHAT = (
    "top_k", "min_p", "min_tokens", "frequency_penalty", "presence_penalty", "repetition_penalty",
    "logit_bias", "stop", "stop_regex", "stop_token_ids", "ignore_eos", "seed", "skip_special_tokens",
    "priority", "extra_key", "cache_salt", "chat_template_kwargs", "max_thinking_tokens",
)  # fmt: skip

RESPONSES_FIELDS: Mapping[str, Rule] = {
    "model": Text(),
    "input": Input(),
    "instructions": Text(ANY_LENGTH),
    "previous_response_id": Text(shortest=1),
    "tools": Items(_TOOL, MAX_TOOLS),
    "tool_choice": ToolChoice(),
    "parallel_tool_calls": Flag(),
    "text": Object({"format": _Format(), "verbosity": Unsupported(("medium",))}),
    "max_output_tokens": CHAT_FIELDS["max_completion_tokens"],
    "temperature": SAMPLING_FIELDS["temperature"],
    "top_p": SAMPLING_FIELDS["top_p"],
    "top_logprobs": CHAT_FIELDS["top_logprobs"],
    "reasoning": Object(
        {
            "effort": Text(),
            "summary": Unsupported(("auto",), "the reasoning itself is in the output"),
            "generate_summary": Unsupported(("auto",), "the reasoning itself is in the output"),
        }
    ),
    "include": Items(OneOf((LOGPROBS,)), 8),
    "metadata": Metadata(),
    "store": Flag(),
    "stream": Flag(),
    "stream_options": Object({"include_obfuscation": Unsupported((False,))}),
    "background": Flag(),
    "truncation": Unsupported(("disabled",), "shorten the input"),
    "max_tool_calls": Unsupported((), "there are no built-in tools"),
    "conversation": Unsupported((), "use previous_response_id"),
    "prompt": Unsupported((), "send the text itself"),
    "context_management": Unsupported(([],)),
    "service_tier": Unsupported(("auto", "default")),
    "prompt_cache_retention": Unsupported(),
    "prompt_cache_options": Unsupported(),
    **{name: CHAT_FIELDS[name] for name in ("user", "safety_identifier", "prompt_cache_key")},
    **{name: CHAT_FIELDS[name] for name in _FROM_CHAT},
}  # fmt: skip


def chat_body(fields: Mapping[str, Any], messages: Sequence[Json], rid: str) -> Json:
    """The chat request that does what a Responses request asks for."""
    body: Json = {
        "messages": list(messages),
        "rid": rid,
        "stream": True,
        "stream_options": {"include_usage": True},
        **{name: fields[name] for name in ("model", "temperature", "top_p", "tool_choice") if name in fields},
        **{name: fields[name] for name in ("parallel_tool_calls", *_FROM_CHAT) if name in fields},
    }
    if "max_output_tokens" in fields:
        body["max_completion_tokens"] = fields["max_output_tokens"]
    if fields.get("tools"):
        body["tools"] = [_chat_tool(tool) for tool in fields["tools"]]
    if "format" in fields.get("text", {}):
        body["response_format"] = fields["text"]["format"]
    if "effort" in fields.get("reasoning", {}):
        body["reasoning_effort"] = fields["reasoning"]["effort"]
    if LOGPROBS in fields.get("include", ()) or fields.get("top_logprobs"):
        body |= {"logprobs": True, "top_logprobs": fields.get("top_logprobs", 0)}
    return body


def _chat_tool(tool: Json) -> Json:
    function = {name: tool[name] for name in ("name", "description", "parameters") if name in tool}
    strict = {"strict": True} if tool.get("strict") else {}
    return {"type": "function", "function": {**function, **strict}}


# Names of a chat request's fields in this route.
NAMES: Mapping[str, str] = {
    "messages": "input",
    "prompt": "input",
    "input_ids": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "max_new_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "min_new_tokens": "min_tokens",
    "sampling_seed": "seed",
}


def messages_of(items: Sequence[Json], find: Callable[[str], Json | None]) -> list[Json]:
    """Items as chat messages. Reasoning and calls belong to the assistant's message beside them.

    `find` resolves a reference. Raises RequestError for one that it does not know.
    """
    messages: list[Json] = []
    thought = ""
    for index, given in enumerate(items):
        item: Json | None = given
        if given["type"] == "item_reference":
            item = find(given["id"])
        if item is None:
            at = f"input[{index}].id"
            raise RequestError(f"{at}: no stored item has this id", code="not_found", param=at)
        item = as_text(item)
        kind, role = item["type"], item.get("role")
        if kind == "reasoning":
            thought += item.get("content") or item.get("summary") or ""
            continue
        if kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
        elif kind == "message" and role != "assistant":
            messages.append({"role": role, "content": item["content"]})
        else:
            _add_to_assistant(messages, item, thought)
        thought = ""
    return messages


def _add_to_assistant(messages: list[Json], item: Json, thought: str) -> None:
    last = messages[-1] if messages else {}
    calls = item["type"] == "function_call"
    if last.get("role") != "assistant" or not calls or thought:
        last = {"role": "assistant", "content": "" if calls else item["content"]}
        if thought:
            last["reasoning_content"] = thought
        messages.append(last)
    if calls:
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        last.setdefault("tool_calls", []).append(call)


def as_text(item: Json) -> Json:
    """An item as `Input` reads it: content as text."""
    lists = {name: item[name] for name in ("content", "summary") if isinstance(item.get(name), list)}
    return {**item, **{name: Parts().read(value, name) for name, value in lists.items()}}
