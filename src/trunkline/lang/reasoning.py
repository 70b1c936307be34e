"""Reasoning and answer of a whole text, told apart by the tags of a model family."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from trunkline.types import RequestError

_THINK = ("<think>", "</think>")
_TAGS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "deepseek-r1": _THINK,
        "deepseek-v3": _THINK,
        "qwen3": _THINK,
        "qwen3-thinking": _THINK,
        "glm45": _THINK,
        "minimax": _THINK,
        "step3": _THINK,
        "nemotron_3": _THINK,
        "interns1": _THINK,
        "kimi": ("◁think▷", "◁/think▷"),
        "mistral": ("[THINK]", "[/THINK]"),
    }
)


def split_reasoning(text: str, model_type: str) -> tuple[str, str]:
    """(reasoning, answer). Text up to the closing tag is reasoning even if its opening tag stood in the
    prompt; an opening tag that is never closed makes the rest reasoning. Raises RequestError for an unknown
    family."""
    if model_type not in _TAGS:
        raise RequestError(
            f"model_type is {model_type!r}; it must be one of {', '.join(_TAGS)}",
            code="invalid_value",
            param="model_type",
        )
    begin, end = _TAGS[model_type]
    if end in text:
        thought, _, answer = text.partition(end)
        return thought.strip().removeprefix(begin).strip(), answer.strip()
    if begin in text:
        answer, _, thought = text.partition(begin)
        return thought.strip(), answer.strip()
    return "", text
