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

from trunkline.engine.constraint import Constraint, take_constraint
from trunkline.engine.fields import read_fields
from trunkline.engine.frontend import Chunk, GenerationRequest, Prepared
from trunkline.engine.native import cache_salt, request_ids
from trunkline.engine.usage import Usage
from trunkline.server.call import Json, ServedModel, includes_usage, usage_dict
from trunkline.server.chat_prompt import chat_prompt
from trunkline.server.details import Details
from trunkline.server.endpoint import Access, Endpoint, Parts
from trunkline.server.fields import CHAT_FIELDS
from trunkline.server.parts import OutputParts, Part, Thought
from trunkline.server.respond import generation
from trunkline.server.tools.choice import ToolPlan, plan_tools
from trunkline.server.tools.grammar import const, sequence
from trunkline.server.tools.parser import CallArguments, CallEnd, CallStart
from trunkline.text.harmony import CHANNEL, MESSAGE, START
from trunkline.text.reasoning import Reasoning
from trunkline.text.tokenizer import Tokenizer
from trunkline.types import FinishReason, GrammarSpec, LogprobParams, RequestError, TokenLogprobs


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
    plan: ToolPlan
    whole_reasoning: bool
    details: Details
    names: Mapping[str, str]
    model: ServedModel

    def parts(self) -> OutputParts:
        """What reads one completion."""
        reasoning = self.requests[0].reasoning
        parser = None if self.plan.format is None else self.plan.format.parser(self.plan.tools)
        inline = reasoning is not None and not reasoning.separate
        return OutputParts(parser, inline=inline, whole=self.whole_reasoning)

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
                    choice = choices[chunk.index] = _Choice(self.parts(), self.model.tokenizer)
                    begun = _choice_event(chunk.index, {"role": "assistant", "content": ""})
                    yield {**base, "choices": [{**begun, **self.details.before(batch[0])}]}
                told = choice.events(chunk, self.details.needs_event(chunk))
                self.details.add(told, chunk, self.model.weight_version)
                for event in told:
                    yield {**base, "choices": [event]}
        if self.include_usage or not self.stream:
            yield {**base, "choices": [], "usage": usage_dict(usage)}

    def join(self, events: Sequence[Json]) -> Json:
        joined: dict[int, Json] = {}
        for event in chain.from_iterable(event["choices"] for event in events):
            whole = joined.setdefault(event["index"], _empty_choice(event["index"]))
            _join_delta(whole["message"], event["delta"])
            if event["logprobs"] is not None:
                whole["logprobs"] = whole["logprobs"] or {"content": [], "refusal": None}
                whole["logprobs"]["content"] += event["logprobs"]["content"]
            if event["finish_reason"] is not None:
                whole |= {name: event[name] for name in ("finish_reason", "matched_stop")}
            self.details.join(whole, event)
        for whole in joined.values():
            if "tool_calls" in whole["message"] and not whole["message"]["content"]:
                whole["message"]["content"] = None
        choices = [joined[index] for index in sorted(joined)]
        last = events[-1]
        return {**last, "object": "chat.completion", "choices": choices}


def _join_delta(message: Json, delta: Json) -> None:
    message["content"] += delta.get("content", "")
    if "reasoning_content" in delta:
        message["reasoning_content"] = message.get("reasoning_content", "") + delta["reasoning_content"]
    for call in delta.get("tool_calls", ()):
        calls = message.setdefault("tool_calls", [])
        if "id" in call:
            first = {name: value for name, value in call.items() if name != "index"}
            calls.append({**first, "function": dict(call["function"])})
        else:
            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]


class _Choice:
    """One completion on its way to events."""

    def __init__(self, parts: OutputParts, tokenizer: Tokenizer) -> None:
        self._parts = parts
        self._tokenizer = tokenizer
        self._num_calls = 0

    def events(self, chunk: Chunk, always: bool = False) -> list[Json]:
        """At least one, if `always`."""
        logprobs = None
        if chunk.logprobs:
            content = [token_entry(token, self._tokenizer) for token in chunk.logprobs]
            for index in chunk.forced:
                content[index]["forced"] = True  # its grammar left no other
            logprobs = {"content": content, "refusal": None}
        found = [delta for part in self._parts.feed(chunk) if (delta := self._delta(part)) is not None]
        deltas = found or ([{}] if logprobs or always else [])
        events = [_choice_event(chunk.index, delta) for delta in deltas]
        if logprobs:
            events[0]["logprobs"] = logprobs
        if chunk.finish is not None:
            events.append({**_choice_event(chunk.index, {}), **self._finish(chunk.finish)})
        return events

    def _delta(self, part: Part) -> Json | None:
        match part:
            case str():
                return {"content": part}
            case Thought(text):
                return {"reasoning_content": text}
            case CallStart(name, id):
                self._num_calls += 1
                return self._call(
                    id=id or f"call_{uuid.uuid4().hex[:24]}",
                    type="function",
                    function={"name": name, "arguments": ""},
                )
            case CallArguments(text):
                return self._call(function={"arguments": text})
            case CallEnd():
                return None

    def _call(self, **fields: Any) -> Json:
        return {"tool_calls": [{"index": self._num_calls - 1, **fields}]}

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
    plan = plan_tools(fields, model.tools, take_constraint(fields))
    if plan.shown and not model.template.shows_tools:
        raise RequestError(
            "this model's chat template does not show tools", code="unsupported_field", param="tools"
        )
    token_limit_name = _token_limit(fields)
    names = {"prompt": "messages", "input_ids": "messages", "max_new_tokens": token_limit_name}
    most_thinking = fields.get("max_thinking_tokens")
    bounded = plan.constraint is not None or most_thinking is not None
    prompt = chat_prompt(model.template, fields, plan.shown, model.reasoning, bounded=bounded)
    reasoning = prompt.reasoning
    if most_thinking is not None and not (reasoning and reasoning.gates):
        raise RequestError(
            "max_thinking_tokens: this request does not reason (chat_template_kwargs)",
            code="invalid_value",
            param="max_thinking_tokens",
        )
    request = GenerationRequest(
        rid=request_ids(fields, "chatcmpl", 1)[0],
        prompt=prompt.text,
        params=model.sampling_params(fields, max_new_tokens=None),
        logprobs=_logprob_params(fields),
        cache_salt=cache_salt(fields),
        priority=fields.get("priority"),
        explain_prefix=fields.get("return_prefix_miss", False),
        add_special_tokens=False,
        constraint=_in_final_message(plan, reasoning),
        reasoning=reasoning,
        max_thinking_tokens=most_thinking,
        shown=(*(plan.format.marks if plan.format else ()), *(reasoning.format.marks if reasoning else ())),
    )
    return ChatCall(
        requests=[request],
        stream=fields.get("stream", False),
        include_usage=includes_usage(fields),
        details=Details.of(fields),
        plan=plan,
        whole_reasoning=not fields.get("stream_reasoning", True),
        names={**names, "min_new_tokens": "min_tokens", "sampling_seed": "seed"},
        model=model,
    )


def _in_final_message(plan: ToolPlan, reasoning: Reasoning | None) -> Constraint | None:
    """The constraint of an answer that stands in a message of its own (harmony)."""
    found = plan.constraint
    if found is None or reasoning is None or not reasoning.format.harmony or found.field == "tools":
        return found
    spec = found.spec
    content: Json
    match spec.kind:
        case "json_object":
            content = {"type": "json_schema", "json_schema": {"type": "object"}}
        case "json_schema":
            content = {"type": "json_schema", "json_schema": json.loads(spec.source)}
        case "regex":
            content = {"type": "regex", "pattern": spec.source}
        case _:
            raise RequestError(
                f"{found.field}: this model writes messages on channels, in which only a JSON schema or a "
                "regex can be enforced",
                code="unsupported_field",
                param=found.field,
            )
    form = sequence([const(f"{START}assistant{CHANNEL}final{MESSAGE}"), content])
    source = json.dumps({"type": "structural_tag", "format": form}, ensure_ascii=False)
    origins = (("/format/elements/1", found.field),)
    return Constraint(GrammarSpec("structural_tag", source, spec.ordered), found.field, origins)


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
