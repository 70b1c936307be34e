"""From the messages of a chat to its prompt, and what the prompt shows of the reasoning to come."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trunkline.server.call import Json
from trunkline.text.chat_template import ChatTemplate
from trunkline.text.reasoning import Reasoning, ReasoningFormat
from trunkline.types import RequestError


@dataclass(frozen=True)
class ChatPrompt:
    """`reasoning`: what is known of the output's; None where the model's way of reasoning is not known."""

    text: str
    reasoning: Reasoning | None


def chat_prompt(
    template: ChatTemplate,
    fields: Mapping[str, Any],
    tools: list[Json] | None,
    found: ReasoningFormat | None,
    *,
    bounded: bool,
) -> ChatPrompt:
    """Render checked fields. `bounded`: a grammar, or a limit on thinking, waits for reasoning to end.
    Raises RequestError."""
    prompt = _render(template, fields, tools)
    if found is None:
        return ChatPrompt(prompt, None)
    begun = _begun(prompt, fields, found)
    gates = begun if begun is not None else bounded and _would_reason(template, fields, tools, prompt, found)
    inside = found.always and not found.harmony if begun is None else begun
    return ChatPrompt(
        prompt,
        Reasoning(
            found, inside=inside, gates=bounded and gates, separate=fields.get("separate_reasoning", True)
        ),
    )


def _begun(prompt: str, fields: Mapping[str, Any], found: ReasoningFormat) -> bool | None:
    """Whether the prompt has begun the reasoning of the answer; False: it has ended it; None: neither."""
    if found.harmony:
        return None
    if fields.get("continue_final_message"):
        content = fields["messages"][-1].get("content", "")
        return bool(content.rfind(found.begin) > content.rfind(found.end))
    tail = prompt.rstrip()
    if tail.endswith((found.begin, found.end)):
        return tail.endswith(found.begin)
    return None


def _would_reason(
    template: ChatTemplate,
    fields: Mapping[str, Any],
    tools: list[Json] | None,
    prompt: str,
    found: ReasoningFormat,
) -> bool:
    """Whether the answer begins with reasoning although the prompt does not say so: the format always does,
    or the same prompt without thinking is another one."""
    if found.always or found.harmony:
        return True
    switch = next((name for name in ("enable_thinking", "thinking") if name in template.variables), None)
    if switch is None:
        return False
    kwargs = {**_kwargs(fields), switch: False}
    return _render(template, {**fields, "chat_template_kwargs": kwargs}, tools) != prompt


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
