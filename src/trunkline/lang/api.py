"""The words of the language."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, overload

from trunkline.lang import ir
from trunkline.lang.choices import ChoicesSamplingMethod, token_length_normalized
from trunkline.lang.global_config import global_config
from trunkline.lang.program import SglFunction, resolve_backend

ROLES = ("system", "user", "assistant")


@overload
def function(func: Callable[..., Any]) -> SglFunction: ...
@overload
def function(*, num_api_spec_tokens: int | None = None) -> Callable[[Callable[..., Any]], SglFunction]: ...
def function(func: Callable[..., Any] | None = None, num_api_spec_tokens: int | None = None) -> Any:
    """Makes a program of a function whose first parameter is `s`. Use it bare or with arguments.

    `num_api_spec_tokens`: on an OpenAI-compatible endpoint, generate at least so many tokens in one call,
    from which the `gen`s that follow take their text as long as it fits."""
    if func is not None:
        return SglFunction(func)
    return lambda func: SglFunction(func, num_api_spec_tokens)


def gen(
    name: str | None = None,
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    n: int | None = None,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    stop_regex: str | Sequence[str] | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    ignore_eos: bool | None = None,
    return_logprob: bool | None = None,
    logprob_start_len: int | None = None,
    top_logprobs_num: int | None = None,
    return_text_in_logprobs: bool | None = None,
    dtype: type | str | None = None,
    choices: Sequence[str] | None = None,
    choices_method: ChoicesSamplingMethod | None = None,
    regex: str | None = None,
    json_schema: str | None = None,
) -> ir.Expr:
    """Text from the model, kept as variable `name`. What is None is as the run says.

    With `choices`, it is `select`. `dtype` (int, float, bool, str) constrains the text to such a value and
    takes precedence over `regex`. Raises re.error for a `regex` that is none."""
    if choices is not None:
        return select(name, choices, 0.0 if temperature is None else temperature, choices_method)
    if regex is not None:
        re.compile(regex)
    return ir.Gen(
        name,
        ir.Sampling(
            max_new_tokens=max_tokens,
            min_new_tokens=min_tokens,
            n=n,
            stop=stop,
            stop_token_ids=stop_token_ids,
            stop_regex=stop_regex,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            ignore_eos=ignore_eos,
            return_logprob=return_logprob,
            logprob_start_len=logprob_start_len,
            top_logprobs_num=top_logprobs_num,
            return_text_in_logprobs=return_text_in_logprobs,
            dtype=dtype,
            regex=regex,
            json_schema=json_schema,
        ),
    )


def _typed(
    dtype: type,
    name: str | None = None,
    max_tokens: int | None = None,
    n: int | None = None,
    stop: str | Sequence[str] | None = None,
    **sampling: Any,
) -> ir.Expr:
    for other in ("min_tokens", "dtype", "choices", "choices_method", "regex", "json_schema"):
        if other in sampling:
            raise TypeError(f"{other} doesn't go with gen_{'int' if dtype is int else 'string'}()")
    return gen(name, max_tokens, n=n, stop=stop, dtype=dtype, **sampling)


# `gen` of an integer, or of a string in double quotes. They take what `gen` takes, but for the names above.
gen_int, gen_string = partial(_typed, int), partial(_typed, str)


def select(
    name: str | None = None,
    choices: Sequence[str] | None = None,
    temperature: float = 0.0,
    choices_method: ChoicesSamplingMethod | None = None,
) -> ir.Expr:
    """The choice that the model finds best, by `choices_method` (token_length_normalized if None).

    Raises ValueError without choices, and for a temperature: the decision is never sampled.
    """
    if not choices:
        raise ValueError("select() needs choices")
    if temperature > 1e-5:
        raise ValueError(f"select() decides by likelihood: temperature is {temperature}, it must be 0")
    return ir.Select(name, tuple(choices), choices_method or token_length_normalized)


def image(expr: str | bytes) -> ir.Expr:
    """An image: the path of a file, or its bytes."""
    return ir.Image(expr)


def video(path: str, num_frames: int) -> ir.Expr:
    """`num_frames` frames of a video file."""
    return ir.Video(path, num_frames)


def separate_reasoning(expr: Any, model_type: str) -> ir.Expr:
    """Each `gen` of `expr` keeps its answer in its variable, and its reasoning in
    `<name>_reasoning_content`."""
    parts: list[ir.Expr] = []
    for part in ir.as_expr(expr).parts():
        parts.append(part)
        if isinstance(part, ir.Gen | ir.Select):
            if part.name is None:
                raise ValueError("separate_reasoning() needs a name for each gen()")
            parts.append(ir.SplitReasoning(part.name, model_type))
    return ir.Sequential(tuple(parts))


# A whole turn of each role, and what begins and ends one: `user("hi")`, `user_begin() + "hi" + user_end()`.
system, user, assistant = (partial(ir.turn, role) for role in ROLES)
system_begin, user_begin, assistant_begin = (partial(ir.RoleBegin, role) for role in ROLES)
system_end, user_end, assistant_end = (partial(ir.RoleEnd, role) for role in ROLES)


def set_default_backend(backend: Any) -> None:
    """What programs run on when they are given no backend. Raises TypeError for what is none."""
    if backend is not None:
        resolve_backend(backend)
    global_config.default_backend = backend  # as it was given: a Runtime must stay alive


def flush_cache(backend: Any = None) -> None:
    """Empty the backend's prefix cache. Raises RequestError where it has none, or while requests are
    running."""
    global_config.run(resolve_backend(backend).flush())


def get_server_info(backend: Any = None) -> dict[str, Any]:
    """What the backend says about itself. Raises RequestError where it doesn't."""
    info: dict[str, Any] = global_config.run(resolve_backend(backend).server_info())
    return info
