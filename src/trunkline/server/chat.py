"""POST /v1/chat/completions."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import chain
from typing import Any

from trunkline.engine.constraint import THINK_END, take_constraint
from trunkline.engine.fields import read_fields
from trunkline.engine.frontend import Chunk, GenerationRequest, Prepared
from trunkline.engine.native import cache_salt
from trunkline.engine.usage import Usage
from trunkline.server.call import Json, ServedModel, includes_usage, request_ids, usage_dict
from trunkline.server.endpoint import Access, Endpoint, Parts
from trunkline.server.fields import CHAT_FIELDS
from trunkline.server.respond import generation
from trunkline.server.tools.hermes import BEGIN, HermesParser, ToolCall
from trunkline.text.chat_template import ChatTemplate
from trunkline.text.tokenizer import Tokenizer
from trunkline.types import FinishReason, LogprobParams, RequestError, TokenLogprobs

THINK_BEGIN = "<think>"


def endpoints(parts: Parts) -> list[Endpoint]:
    handler = generation(parse_chat, parts)
    return [
        Endpoint(
            "/v1/chat/completions",
            ("POST",),
            handler,
            Access.USER,
            CHAT_FIELDS,
            summary="The answer in a chat",
        )
    ]


@dataclass(frozen=True, kw_only=True)
class ChatCall:
    """A parsed chat request."""

    requests: list[GenerationRequest]
    stream: bool
    include_usage: bool
    parses_tools: bool
    names: Mapping[str, str]
    model: ServedModel

    async def events(
        self, batch: Sequence[Prepared], chunks: AsyncGenerator[Chunk, None]
    ) -> AsyncGenerator[Json, None]:
        request = batch[0].request
        usage = Usage(request.params.n)
        base = {
            "id": request.rid,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": self.model.name,
        }
        choices: dict[int, _Choice] = {}
        async with aclosing(chunks):
            async for chunk in chunks:
                usage.add(chunk)
                choice = choices.get(chunk.index)
                if choice is None:
                    choice = choices[chunk.index] = _Choice(self.parses_tools, self.model.tokenizer)
                    yield {
                        **base,
                        "choices": [_choice_event(chunk.index, {"role": "assistant", "content": ""})],
                    }
                for event in choice.events(chunk):
                    yield {**base, "choices": [event]}
        if self.include_usage or not self.stream:
            yield {**base, "choices": [], "usage": usage_dict(usage)}

    def join(self, events: Sequence[Json]) -> Json:
        joined: dict[int, Json] = {}
        for event in chain.from_iterable(event["choices"] for event in events):
            whole = joined.setdefault(event["index"], _empty_choice(event["index"]))
            message, delta = whole["message"], event["delta"]
            message["content"] += delta.get("content", "")
            for call in delta.get("tool_calls", ()):
                whole_call = {name: value for name, value in call.items() if name != "index"}
                message.setdefault("tool_calls", []).append(whole_call)
            if event["logprobs"] is not None:
                whole["logprobs"] = whole["logprobs"] or {"content": [], "refusal": None}
                whole["logprobs"]["content"] += event["logprobs"]["content"]
            if event["finish_reason"] is not None:
                whole |= {name: event[name] for name in ("finish_reason", "matched_stop")}
        for whole in joined.values():
            if "tool_calls" in whole["message"] and not whole["message"]["content"]:
                whole["message"]["content"] = None
        choices = [joined[index] for index in sorted(joined)]
        last = events[-1]
        return {**last, "object": "chat.completion", "choices": choices}


class _Choice:
    """One completion on its way to events."""

    def __init__(self, parses_tools: bool, tokenizer: Tokenizer) -> None:
        self._parser = HermesParser() if parses_tools else None
        self._tokenizer = tokenizer
        self._num_calls = 0

    def events(self, chunk: Chunk) -> list[Json]:
        logprobs = None
        if chunk.logprobs:
            content = [token_entry(token, self._tokenizer) for token in chunk.logprobs]
            for index in chunk.forced:
                content[index]["forced"] = True  # its grammar left no other
            logprobs = {"content": content, "refusal": None}
        deltas = list(map(self._delta, self._parts(chunk))) or ([{}] if logprobs else [])
        events = [_choice_event(chunk.index, delta) for delta in deltas]
        if logprobs:
            events[0]["logprobs"] = logprobs
        if chunk.finish is not None:
            events.append({**_choice_event(chunk.index, {}), **self._finish(chunk.finish)})
        return events

    def _parts(self, chunk: Chunk) -> list[str | ToolCall]:
        if self._parser is None:
            return [chunk.text] if chunk.text else []
        parts = self._parser.feed(chunk.text)
        return parts + self._parser.flush() if chunk.finish is not None else parts

    def _delta(self, part: str | ToolCall) -> Json:
        if isinstance(part, str):
            return {"content": part}
        index = self._num_calls
        self._num_calls += 1
        function = {"name": part.name, "arguments": part.arguments}
        call = {
            "index": index,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": function,
        }
        return {"tool_calls": [call]}

    def _finish(self, finish: FinishReason) -> Json:
        reason = "tool_calls" if finish.kind == "stop" and self._num_calls else finish.kind
        return {"finish_reason": reason, "matched_stop": finish.matched}


def _choice_event(index: int, delta: Json) -> Json:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, "matched_stop": None}


def _empty_choice(index: int) -> Json:
    message = {"role": "assistant", "content": ""}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": None, "matched_stop": None}


def token_entry(token: TokenLogprobs, tokenizer: Tokenizer) -> Json:
    """One entry of `logprobs.content`."""

    def entry(token_id: int, logprob: float | None) -> Json:
        text, piece = tokenizer.token_text(token_id), tokenizer.piece(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(piece)}

    alternatives = [entry(token_id, logprob) for token_id, logprob in token.top]
    return {**entry(token.token_id, token.logprob), "top_logprobs": alternatives}


# ---------------------------------------------------------------------- parsing
def parse_chat(body: Mapping[str, Any], model: ServedModel) -> ChatCall:
    """Check a request and render its prompt. Raises RequestError."""
    fields = read_fields(CHAT_FIELDS, body)
    model.check_name(fields.get("model"))
    if "messages" not in fields:
        raise RequestError("messages is missing: send at least one", code="missing_field", param="messages")
    if model.template is None:
        raise RequestError(
            "this model has no chat template, so it can't chat: use /v1/completions, or start the server "
            "with --chat-template",
            code="no_chat_template",
            param="messages",
        )
    tools = fields.get("tools") if fields.get("tool_choice") != "none" else None
    if tools and not model.template.shows_tools:
        raise RequestError(
            "this model's chat template does not show tools", code="unsupported_field", param="tools"
        )
    token_limit_name = _token_limit(fields)
    names = {"prompt": "messages", "input_ids": "messages", "max_new_tokens": token_limit_name}
    prompt = _render(model.template, fields, tools)
    constraint, most_thinking = take_constraint(fields), fields.get("max_thinking_tokens")
    bounded = constraint is not None or most_thinking is not None
    reasons = bounded and _reasons(model.template, fields, tools, prompt)
    if most_thinking is not None and not reasons:
        raise RequestError(
            "max_thinking_tokens: this request does not reason (chat_template_kwargs)",
            code="invalid_value",
            param="max_thinking_tokens",
        )
    request = GenerationRequest(
        rid=request_ids(fields, "chatcmpl", 1)[0],
        prompt=prompt,
        params=model.sampling_params(fields, max_new_tokens=None),
        logprobs=_logprob_params(fields),
        cache_salt=cache_salt(fields),
        priority=fields.get("priority", 0),
        explain_prefix=fields.get("return_prefix_miss", False),
        add_special_tokens=False,
        constraint=constraint,
        reasons=reasons,
        max_thinking_tokens=most_thinking,
    )
    return ChatCall(
        requests=[request],
        stream=fields.get("stream", False),
        include_usage=includes_usage(fields),
        parses_tools=bool(tools) and BEGIN in model.template.source,
        names={**names, "min_new_tokens": "min_tokens", "sampling_seed": "seed"},
        model=model,
    )


def _token_limit(fields: dict[str, Any]) -> str:
    """Name of the field that limits the output; the older of the two goes."""
    if "max_completion_tokens" not in fields:
        return "max_tokens"
    if fields.pop("max_tokens", fields["max_completion_tokens"]) != fields["max_completion_tokens"]:
        raise RequestError(
            "max_tokens and max_completion_tokens differ: send one of them",
            code="invalid_value",
            param="max_tokens",
        )
    return "max_completion_tokens"


def _logprob_params(fields: Mapping[str, Any]) -> LogprobParams | None:
    if fields.get("logprobs"):
        return LogprobParams(top_n=fields.get("top_logprobs", 0))
    if fields.get("top_logprobs"):
        raise RequestError("top_logprobs needs logprobs: true", code="invalid_value", param="top_logprobs")
    return None


def _render(template: ChatTemplate, fields: Mapping[str, Any], tools: list[Json] | None) -> str:
    messages = [_message(message, f"messages[{i}]") for i, message in enumerate(fields["messages"])]
    continues = fields.get("continue_final_message", False)
    if continues and messages[-1]["role"] != "assistant":
        raise RequestError(
            "continue_final_message needs a last message of role assistant",
            code="invalid_value",
            param="continue_final_message",
        )
    return template.render(
        messages, tools=tools, continue_final_message=continues, variables=_variables(template, fields)
    )


def _message(message: Json, name: str) -> Json:
    """A message as templates expect it: text content always there, arguments of calls as objects."""
    role = message.get("role")
    if role is None:
        raise RequestError(f"{name}.role is missing", code="missing_field", param=f"{name}.role")
    if "content" not in message and role != "assistant":
        raise RequestError(f"{name}.content is missing", code="missing_field", param=f"{name}.content")
    shown = {
        **message,
        "role": "system" if role == "developer" else role,
        "content": message.get("content", ""),
    }
    if "tool_calls" in message:
        calls = enumerate(message["tool_calls"])
        shown["tool_calls"] = [_tool_call(call, f"{name}.tool_calls[{i}]") for i, call in calls]
    return shown


def _tool_call(call: Json, name: str) -> Json:
    function = call.get("function", {})
    if "name" not in function:
        raise RequestError(
            f"{name}.function.name is missing", code="missing_field", param=f"{name}.function.name"
        )
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise RequestError(
            f"{name}.function.arguments must be a JSON object, as text",
            code="invalid_value",
            param=f"{name}.function.arguments",
        )
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def _reasons(
    template: ChatTemplate, fields: Mapping[str, Any], tools: list[Json] | None, prompt: str
) -> bool:
    """Whether the answer begins with reasoning: the prompt has begun it, or has not ended it as the same
    prompt without thinking does."""
    tail = prompt.rstrip()
    if tail.endswith((THINK_BEGIN, THINK_END)):
        return tail.endswith(THINK_BEGIN)
    if "enable_thinking" not in template.variables:
        return False
    kwargs = {**_kwargs(fields), "enable_thinking": False}
    return _render(template, {**fields, "chat_template_kwargs": kwargs}, tools) != prompt


def _variables(template: ChatTemplate, fields: Mapping[str, Any]) -> Json:
    """What the template is given besides messages: only names that it reads.

    A switch for thinking that asks for what a model without thinking does anyway is accepted.
    """
    given = {f"chat_template_kwargs.{name}": (name, value) for name, value in _kwargs(fields).items()}
    if "reasoning_effort" in fields:
        given["reasoning_effort"] = ("reasoning_effort", fields["reasoning_effort"])
    variables = {}
    for param, (name, value) in given.items():
        if name in template.variables:
            variables[name] = value
        elif not (name in ("enable_thinking", "thinking") and value is False):
            known = ", ".join(sorted(template.variables)) or "none"
            raise RequestError(
                f"{param[:200]}: this model's chat template does not read it (it reads: {known})",
                code="unsupported_field",
                param=param[:200],
            )
    return variables


def _kwargs(fields: Mapping[str, Any]) -> Json:
    kwargs: Json = fields.get("chat_template_kwargs", {})
    return {name: value for name, value in kwargs.items() if value is not None}
