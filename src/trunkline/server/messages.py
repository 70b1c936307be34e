"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's interface."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

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
from trunkline.engine.frontend import Chunk, GenerationRequest, Prepared
from trunkline.engine.usage import Usage
from trunkline.server.call import Json, ServedModel
from trunkline.server.chat import ChatCall
from trunkline.server.endpoint import Access, Endpoint, Parts
from trunkline.server.fields import ANY_LENGTH, MAX_MESSAGES, MAX_TOOLS
from trunkline.server.framing import ANTHROPIC
from trunkline.server.http import json_response, read_json
from trunkline.server.parts import Part, Thought
from trunkline.server.respond import generation
from trunkline.server.tools.parser import CallArguments, CallEnd, CallStart
from trunkline.server.translated import check_not_aborted, missing, parse_translated, thinking_kwargs
from trunkline.types import FinishReason, RequestError

MAX_BLOCKS = 4096

# cache_control says what to cache; here every prefix is, so it changes nothing, by definition.
_CACHE: Mapping[str, Rule] = {"cache_control": Object()}
_TEXT_BLOCK: Mapping[str, Rule] = {
    "type": Text(),
    "text": Text(ANY_LENGTH),
    "citations": Unsupported(([],)),
    **_CACHE,
}


@dataclass(frozen=True)
class Blocks(Rule):
    """Text, or a list of blocks of the types in the table. Reads as a list of blocks."""

    tables: Mapping[str, Mapping[str, Rule]]

    def read(self, value: Any, name: str) -> list[Json]:
        if isinstance(value, str):
            return [{"type": "text", "text": value}]
        if not isinstance(value, list):
            raise wrong_type(name, "a string or a list of blocks", value)
        if len(value) > MAX_BLOCKS:
            raise RequestError(
                f"{name} has {len(value)} blocks; it may have {MAX_BLOCKS}", code="out_of_range", param=name
            )
        return [self._block(block, f"{name}[{i}]") for i, block in enumerate(value)]

    def _block(self, block: Any, name: str) -> Json:
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(kind, str):
            raise wrong_type(name, 'a block such as {"type": "text", "text": "..."}', block)
        table = self.tables.get(kind)
        if table is None:
            raise RequestError(
                f"{name}.type: blocks of type {kind[:60]!r} are not supported here; "
                f"known are {', '.join(self.tables)}",
                code="unsupported_field",
                param=f"{name}.type",
            )
        fields = read_fields(table, block, f"{name}.")
        for needed in ("text", "id", "name", "tool_use_id", "thinking"):
            if needed in table and needed not in fields:
                raise RequestError(
                    f"{name}.{needed} is missing", code="missing_field", param=f"{name}.{needed}"
                )
        return fields


_TEXT = Blocks({"text": _TEXT_BLOCK})
_SEARCH_RESULT: Mapping[str, Rule] = {
    "type": Text(),
    "source": Text(ANY_LENGTH),
    "title": Text(ANY_LENGTH),
    "content": _TEXT,
    "citations": Unsupported(({"enabled": False},)),
    **_CACHE,
}
_CONTENT = Blocks(
    {
        "text": _TEXT_BLOCK,
        "search_result": _SEARCH_RESULT,
        "tool_use": {
            "type": Text(),
            "id": Text(),
            "name": Text(),
            "input": Object(),
            "caller": Unsupported(({"type": "direct"},)),
            "toolset_name": Unsupported(),
            **_CACHE,
        },
        "tool_result": {
            "type": Text(),
            "tool_use_id": Text(),
            "content": Blocks({"text": _TEXT_BLOCK, "search_result": _SEARCH_RESULT}),
            "is_error": Flag(),
            **_CACHE,
        },
        "thinking": {"type": Text(), "thinking": Text(ANY_LENGTH), "signature": Text(ANY_LENGTH)},
    }
)
_MESSAGE = Object({"role": OneOf(("user", "assistant")), "content": _CONTENT})
_TOOL = Object(
    {
        "type": OneOf(("custom",)),
        "name": Text(shortest=1),
        "description": Text(ANY_LENGTH),
        "input_schema": Object(),
        "strict": Flag(),
        "allowed_callers": Unsupported((["direct"],)),
        "defer_loading": Unsupported((False,)),
        "input_examples": Unsupported(([],), "put them into the description"),
        "eager_input_streaming": Flag(),  # arguments always stream as they come
        **_CACHE,
    }
)
_FORMAT = Object({"type": OneOf(("json_schema",)), "schema": Object()})
_BLOCKS_OF: Mapping[str, tuple[str, ...]] = {
    "user": ("text", "search_result", "tool_result"),
    "assistant": ("text", "tool_use", "thinking"),
}
_MODES: Mapping[str, str] = {"auto": "auto", "any": "required", "none": "none"}

COUNT_FIELDS: Mapping[str, Rule] = {
    "model": Text(),
    "messages": Items(_MESSAGE, MAX_MESSAGES, fewest=1),
    "system": _TEXT,
    "tools": Items(_TOOL, MAX_TOOLS),
    "tool_choice": Object(
        {
            "type": OneOf(("auto", "any", "tool", "none")),
            "name": Text(),
            "disable_parallel_tool_use": Flag(),
        }
    ),
    "thinking": Object(
        {
            "type": OneOf(("enabled", "disabled", "adaptive")),
            "budget_tokens": Number(1, INT32_MAX, integer=True),
            "display": Unsupported(("summarized",)),
        }
    ),
    "output_config": Object({"format": _FORMAT, "effort": Text()}),
    "cache_control": Object(),
}
MESSAGES_FIELDS: Mapping[str, Rule] = {
    **COUNT_FIELDS,
    "max_tokens": Number(1, INT32_MAX, integer=True),
    "stream": Flag(),
    "stop_sequences": SAMPLING_FIELDS["stop"],
    "temperature": Number(0, 1),
    "top_p": SAMPLING_FIELDS["top_p"],
    "top_k": SAMPLING_FIELDS["top_k"],
    "metadata": Object({"user_id": Text()}),  # a name of the caller: it changes nothing, by definition
    "service_tier": Unsupported(("auto", "standard_only")),
    "container": Unsupported(),
    "mcp_servers": Unsupported(([],)),
    "context_management": Unsupported(),
    **dict.fromkeys(("inference_geo", "diagnostics", "user_profile_id", "workspace_id"), Unsupported()),
    "speed": Unsupported(("standard",)),
}
_RENAMES = (
    (r"stop", "stop_sequences"),
    (r"tools\[(\d+)\]\.function\.parameters", r"tools[\1].input_schema"),
    (r"tools\[(\d+)\]\.function\.(name|strict)", r"tools[\1].\2"),
    (r"tool_choice\.function\.name", "tool_choice.name"),
    (r"parallel_tool_calls", "tool_choice.disable_parallel_tool_use"),
    (r"chat_template_kwargs\..*", "thinking"),
    (r"max_thinking_tokens", "thinking.budget_tokens"),
    (r"reasoning_effort", "output_config.effort"),
    (r"response_format\.json_schema\.schema", "output_config.format.schema"),
    (r"response_format.*", "output_config.format"),
    (r"continue_final_message", "messages"),
)


def endpoints(parts: Parts) -> list[Endpoint]:
    model = parts.model

    async def count(request: Request) -> Response:
        fields = read_fields(COUNT_FIELDS, await read_json(request))
        prompt = parse_translated(chat_body(fields, model), model, _RENAMES).requests[0].prompt
        assert isinstance(prompt, str)
        tokens = await model.tokenizer.encode_async(prompt, add_special_tokens=False)
        return json_response({"input_tokens": len(tokens)})

    create = generation(parse_messages, parts, ANTHROPIC)
    return [
        Endpoint(path, ("POST",), handler, Access.USER, fields, summary=summary, envelope=ANTHROPIC.envelope)
        for path, handler, fields, summary in (
            ("/v1/messages", create, MESSAGES_FIELDS, "The next message, in Anthropic's interface"),
            ("/v1/messages/count_tokens", count, COUNT_FIELDS, "Tokens of a conversation"),
        )
    ]


# ---------------------------------------------------------------------- request
def parse_messages(body: Mapping[str, Any], model: ServedModel) -> MessagesCall:
    """Check a request and render its prompt. Raises RequestError."""
    fields = read_fields(MESSAGES_FIELDS, body)
    missing(fields, "max_tokens")
    chat = {
        **chat_body(fields, model),
        "max_tokens": fields["max_tokens"],
        "stop": fields.get("stop_sequences"),
        **{name: fields.get(name) for name in ("temperature", "top_p", "top_k", "stream")},
    }
    call = parse_translated(chat, model, _RENAMES)
    schemas = {
        f"tools[{i}].function.parameters": f"tools[{i}].input_schema" for i in range(len(call.plan.tools))
    }
    schemas |= {"response_format.json_schema.schema": "output_config.format.schema"}
    return MessagesCall(call, {**call.names, **schemas, "stop": "stop_sequences"})


def chat_body(fields: Mapping[str, Any], model: ServedModel) -> Json:
    """The conversation as a chat completion's. Raises RequestError."""
    missing(fields, "messages")
    choice, thinking = fields.get("tool_choice", {}), fields.get("thinking", {})
    output = fields.get("output_config", {})
    kind = thinking.get("type")
    messages = [{"role": "system", "content": _text(fields["system"])}] if "system" in fields else []
    for i, message in enumerate(fields["messages"]):
        messages += _messages(message, f"messages[{i}]")
    tools = [_function(tool, f"tools[{i}]") for i, tool in enumerate(fields.get("tools", ()))]
    parallel = False if choice.get("disable_parallel_tool_use") else None
    return {
        "model": fields.get("model"),
        "messages": messages,
        "continue_final_message": True if messages[-1]["role"] == "assistant" else None,
        "tools": tools or None,
        "tool_choice": _choice(choice),
        "parallel_tool_calls": parallel,
        "chat_template_kwargs": thinking_kwargs(model, None if kind is None else kind != "disabled"),
        "max_thinking_tokens": thinking.get("budget_tokens") if kind == "enabled" else None,
        "reasoning_effort": output.get("effort"),
        "response_format": _response_format(output.get("format")),
    }


def _choice(choice: Mapping[str, Any]) -> Any:
    if not choice:
        return None
    if "type" not in choice:
        raise RequestError("tool_choice.type is missing", code="missing_field", param="tool_choice.type")
    if choice["type"] == "tool":
        return {"type": "function", "function": {"name": choice["name"]} if "name" in choice else {}}
    return _MODES[choice["type"]]


def _response_format(form: Mapping[str, Any] | None) -> Json | None:
    if form is None:
        return None
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": form.get("schema")}}


def _function(tool: Mapping[str, Any], name: str) -> Json:
    for needed in ("name", "input_schema"):
        if needed not in tool:
            raise RequestError(f"{name}.{needed} is missing", code="missing_field", param=f"{name}.{needed}")
    function = {"name": tool["name"], "parameters": tool["input_schema"]}
    function |= {key: tool[key] for key in ("description", "strict") if key in tool}
    return {"type": "function", "function": function}


def _text(blocks: Sequence[Json]) -> str:
    return "\n".join(map(_block_text, blocks))


def _block_text(block: Json) -> str:
    if block["type"] == "text":
        return str(block["text"])
    lines = [block.get("title", ""), block.get("source", ""), _text(block.get("content", []))]
    return "\n".join(line for line in lines if line)


def _messages(message: Json, name: str) -> Iterator[Json]:
    """One message as those of a chat: results of tools are messages of their own there."""
    for needed in ("role", "content"):
        if needed not in message:
            raise RequestError(f"{name}.{needed} is missing", code="missing_field", param=f"{name}.{needed}")
    role = message["role"]
    texts: list[str] = []
    calls: list[Json] = []
    thoughts: list[str] = []
    for i, block in enumerate(message["content"]):
        kind = block["type"]
        if kind not in _BLOCKS_OF[role]:
            raise RequestError(
                f"{name}.content[{i}]: a block of type {kind} can't stand in a message of role {role}",
                code="invalid_value",
                param=f"{name}.content[{i}].type",
            )
        if kind == "tool_result":
            if texts:
                yield {"role": "user", "content": "\n".join(texts)}
                texts = []
            yield _result(block)
        elif kind == "tool_use":
            arguments = json.dumps(block.get("input", {}), ensure_ascii=False)
            function = {"name": block["name"], "arguments": arguments}
            calls.append({"id": block["id"], "type": "function", "function": function})
        elif kind == "thinking":
            thoughts.append(block["thinking"])
        else:
            texts.append(_block_text(block))
    if role == "user" and (texts or not message["content"]):
        yield {"role": "user", "content": "\n".join(texts)}
    elif role == "assistant":
        yield {
            "role": "assistant",
            "content": "\n".join(texts),
            **({"tool_calls": calls} if calls else {}),
            **({"reasoning_content": "\n".join(thoughts)} if thoughts else {}),
        }


def _result(block: Json) -> Json:
    text = _text(block.get("content", []))
    content = f"Error: {text}" if block.get("is_error") else text
    return {"role": "tool", "tool_call_id": block["tool_use_id"], "content": content}


# ---------------------------------------------------------------------- response
@dataclass(frozen=True)
class MessagesCall:
    """A parsed request."""

    chat: ChatCall
    names: Mapping[str, str]

    @property
    def requests(self) -> list[GenerationRequest]:
        return self.chat.requests

    @property
    def stream(self) -> bool:
        return self.chat.stream

    async def events(
        self, batch: Sequence[Prepared], chunks: AsyncGenerator[Chunk, None]
    ) -> AsyncGenerator[Json, None]:
        usage, parts, blocks = Usage(1), self.chat.parts(), _Blocks()
        begun = False
        async with aclosing(chunks):
            async for chunk in chunks:
                usage.add(chunk)
                if not begun:
                    begun = True
                    yield self._start(usage)
                    yield {"type": "ping"}
                for part in parts.feed(chunk):
                    for event in blocks.add(part):
                        yield event
                if chunk.finish is not None:
                    check_not_aborted(chunk.finish)
                    for event in blocks.close():
                        yield event
                    yield {
                        "type": "message_delta",
                        "delta": _stop(chunk.finish, blocks.num_calls),
                        "usage": _usage(usage),
                    }
        yield {"type": "message_stop"}

    def _start(self, usage: Usage) -> Json:
        message: Json = {
            "id": f"msg_{uuid.uuid4().hex[:24]}",
            "type": "message",
            "role": "assistant",
            "model": self.chat.model.name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {**_usage(usage), "output_tokens": 0},
        }
        return {"type": "message_start", "message": message}

    def join(self, events: Sequence[Json]) -> Json:
        message: Json = {}
        for event in events:
            match event["type"]:
                case "message_start":
                    message = {**event["message"], "content": []}
                case "content_block_start":
                    message["content"].append(dict(event["content_block"]))
                case "content_block_delta":
                    _join_delta(message["content"][-1], event["delta"])
                case "message_delta":
                    message |= event["delta"] | {"usage": event["usage"]}
        for block in message["content"]:
            if block["type"] == "tool_use":
                _read_input(block)
        return message


class _Blocks:
    """Parts of a completion as blocks, of which one is open at a time."""

    def __init__(self) -> None:
        self._index = -1
        self._open = ""
        self.num_calls = 0

    def add(self, part: Part) -> Iterator[Json]:
        match part:
            case str():
                yield from self._delta("text", {"type": "text_delta", "text": part})
            case Thought(text):
                yield from self._delta("thinking", {"type": "thinking_delta", "thinking": text})
            case CallStart(name, id):
                self.num_calls += 1
                block = {"id": id or f"toolu_{uuid.uuid4().hex[:24]}", "name": name, "input": {}}
                yield from self._begin("tool_use", block)
            case CallArguments(text):
                yield from self._delta("tool_use", {"type": "input_json_delta", "partial_json": text})
            case CallEnd():
                yield from self.close()

    def close(self) -> Iterator[Json]:
        if self._open:
            self._open = ""
            yield {"type": "content_block_stop", "index": self._index}

    def _begin(self, kind: str, fields: Json) -> Iterator[Json]:
        yield from self.close()
        self._index += 1
        self._open = kind
        yield {
            "type": "content_block_start",
            "index": self._index,
            "content_block": {"type": kind, **fields},
        }

    def _delta(self, kind: str, delta: Json) -> Iterator[Json]:
        if self._open != kind:
            yield from self._begin(
                kind, {"text": ""} if kind == "text" else {"thinking": "", "signature": ""}
            )
        yield {"type": "content_block_delta", "index": self._index, "delta": delta}


def _join_delta(block: Json, delta: Json) -> None:
    match delta["type"]:
        case "text_delta":
            block["text"] += delta["text"]
        case "thinking_delta":
            block["thinking"] += delta["thinking"]
        case "input_json_delta":
            block["partial_json"] = block.get("partial_json", "") + delta["partial_json"]


def _read_input(block: Json) -> None:
    """Arguments that are no JSON, such as those of a call that was cut off, stay as they are."""
    try:
        value = json.loads(block.get("partial_json", "{}"))
    except (ValueError, RecursionError):
        return
    if isinstance(value, dict):
        block["input"] = value
        block.pop("partial_json", None)


def _stop(finish: FinishReason, num_calls: int) -> Json:
    if isinstance(finish.matched, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": finish.matched}
    reason = "max_tokens" if finish.kind == "length" else "tool_use" if num_calls else "end_turn"
    return {"stop_reason": reason, "stop_sequence": None}


def _usage(usage: Usage) -> Json:
    """What was read from the cache is no part of the input tokens here."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }
