"""Which parameters were in force for a request, and why: the answer to GET /effective_parameters/{rid}."""

from __future__ import annotations

from typing import Any

import msgspec

from trunkline.config.schema import EngineConfig
from trunkline.engine.journal import Completion, Journal, Origin, Prompt, Record
from trunkline.engine.native import finish_dict
from trunkline.types import RequestError, SamplingParams

_INTERFACE = SamplingParams()


def effective_parameters(
    journal: Journal, config: EngineConfig, rid: str, max_context: int
) -> dict[str, Any]:
    """Of a live or recently ended request. Raises RequestError code `unknown_rid` for any other."""
    record = journal.find(rid)
    if record is None or not record.prompts:
        raise RequestError(
            f"no request {rid[:256]!r} is running or among the last that ended: the id is that of the "
            "answer (id, meta_info.id), or the header x-request-id",
            code="unknown_rid",
            param="rid",
            status=404,
        )
    own = [i for i, prompt in enumerate(record.prompts) if prompt.rid == rid]
    shown = own or range(len(record.prompts))
    return {
        "rid": rid,
        "request_id": record.origin.request_id or None,
        "route": record.origin.route,
        "model": config.model.served_model_name,
        "weight_version": config.model.weight_version,
        "received": record.received,
        "state": state_of(record),
        "prompts": [_prompt(record, i, max_context) for i in shown],
    }


def state_of(record: Record) -> str:
    if record.ended is None:
        return "running"
    if record.error is not None:
        return "failed"
    return "finished" if record.status == 200 else "aborted"


def _prompt(record: Record, position: int, max_context: int) -> dict[str, Any]:
    prompt = record.prompts[position]
    return {
        "rid": prompt.rid,
        "prompt_tokens": prompt.num_tokens,
        "parameters": parameters(prompt, record.origin, max_context),
        "constraint": prompt.grammar,
        "logprobs": prompt.logprobs,
        "priority": prompt.priority,
        "own_cache_namespace": prompt.salted,
        "max_thinking_tokens": prompt.max_thinking,
        "completions": [completion_dict(one) for one in record.completions if one.prompt == position],
    }


def completion_dict(one: Completion) -> dict[str, Any]:
    """How far a completion is, or how it ended."""
    return {
        "completion_tokens": one.num_tokens,
        "cached_tokens": one.cached_tokens,
        "num_retractions": one.retractions,
        "output_digest": f"{one.digest:08x}",
        "finish_reason": None if one.finish is None else finish_dict(one.finish, one.num_tokens),
        **({} if one.prefix_miss is None else {"prefix_miss": one.prefix_miss}),
    }


def parameters(prompt: Prompt, origin: Origin, max_context: int) -> dict[str, Any]:
    """Sampling parameter -> value, source, and where it needs words, why.

    Sources: request (`field` names where), model (its generation_config.json), interface (the default that
    the route documents), server (drawn or bounded here).
    """
    return {name: _parameter(name, prompt, origin, max_context) for name in SamplingParams.__struct_fields__}


def _parameter(name: str, prompt: Prompt, origin: Origin, max_context: int) -> dict[str, Any]:
    asked, used = getattr(prompt.asked, name), getattr(prompt.used, name)
    path = origin.names.get(name, name)
    entry: dict[str, Any] = {"value": msgspec.to_builtins(used, str_keys=True)}
    if name == "sampling_seed" and asked is None:
        return {**entry, "source": "server", "why": "drawn for this request; send it to repeat the output"}
    if asked != used:
        room = max_context - prompt.num_tokens
        was = "no limit was asked for" if asked is None else f"{asked} was the default"
        why = f"{was}; the context of {max_context} tokens leaves {room} behind the prompt"
        return {**entry, "source": "server", "why": why}
    if name in prompt.given:
        return {**entry, "source": "request", "field": path}
    if name in origin.defaults and _same(origin.defaults[name], used):
        return {**entry, "source": "model", "why": "generation_config.json"}
    if used == getattr(_INTERFACE, name):
        return {**entry, "source": "interface"}
    return {**entry, "source": "interface", "why": "set by this route"}


def _same(default: Any, used: Any) -> bool:
    return bool(tuple(default) == used if isinstance(default, list) else default == used)
