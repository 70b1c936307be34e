"""Bounds at admission: what can't be served is refused by name, with the numbers and the fix (P1, P2, P8)."""

from __future__ import annotations

import math

from trunkline.cache import PrefixCache
from trunkline.config.schema import SchedulerConfig
from trunkline.messages import AddRequest
from trunkline.types import MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS, LogprobParams, RequestError, SamplingParams


def output_limit(message: AddRequest, config: SchedulerConfig, cache: PrefixCache, vocab_size: int) -> int:
    """Validate a request and return its limit of output tokens. Raises RequestError."""
    _check_tokens(message.token_ids, vocab_size, "prompt")
    _check_params(message.params, vocab_size)
    if message.logprobs is not None:
        _check_logprobs(message.logprobs, len(message.token_ids), vocab_size)
    if message.pooling is not None and message.params.max_new_tokens != 0:
        raise RequestError(
            "a pooled request yields a vector and no tokens: max_new_tokens must be 0",
            code="out_of_range",
            param="max_new_tokens",
        )
    return _output_room(len(message.token_ids), message.params.max_new_tokens, config, cache)


def _output_room(prompt: int, wanted: int | None, config: SchedulerConfig, cache: PrefixCache) -> int:
    if prompt == 0:
        raise RequestError("the prompt has no tokens: give at least one", code="empty_prompt", param="prompt")
    least = 1 if wanted is None else wanted
    if prompt + least > config.max_context or prompt >= config.max_context:
        raise RequestError(
            f"{prompt} prompt tokens + {least} output tokens are more than the context of "
            f"{config.max_context} tokens: shorten the prompt or lower max_new_tokens (max_tokens)",
            code="context_length_exceeded",
            param="prompt" if prompt >= config.max_context else "max_new_tokens",
        )
    pool = cache.num_pages * cache.page_size
    if cache.pages_for(prompt + least) > cache.num_pages:
        raise RequestError(
            f"{prompt} prompt tokens + {least} output tokens can never fit the KV pool of {pool} tokens: "
            "lower max_new_tokens, or start the server with a larger --max-total-tokens",
            code="kv_pool_exceeded",
            param="max_new_tokens" if wanted else "prompt",
        )
    return min(config.max_context, pool) - prompt if wanted is None else wanted


def _check_tokens(token_ids: list[int], vocab_size: int, param: str) -> None:
    if not token_ids:
        return
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise RequestError(
            f"token id {bad} is outside the vocabulary of {vocab_size}",
            code="token_out_of_range",
            param=param,
        )


def _check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    if math.isnan(value) or not low <= value <= high or (open_low and value == low):
        bracket = "(" if open_low else "["
        raise RequestError(
            f"{name} is {value}, allowed is {bracket}{low}, {high}]", code="out_of_range", param=name
        )


def _check_params(params: SamplingParams, vocab_size: int) -> None:
    _check_range("temperature", params.temperature, 0.0, 1e6)
    _check_range("top_p", params.top_p, 0.0, 1.0, open_low=True)
    _check_range("min_p", params.min_p, 0.0, 1.0)
    _check_range("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
    _check_range("presence_penalty", params.presence_penalty, -2.0, 2.0)
    _check_range("repetition_penalty", params.repetition_penalty, 0.0, 2.0, open_low=True)
    if params.top_k != -1:
        _check_range("top_k", params.top_k, 1, 1 << 31)
    if params.max_new_tokens is not None:
        _check_range("max_new_tokens", params.max_new_tokens, 0, 1 << 31)
        _check_range("min_new_tokens", params.min_new_tokens, 0, params.max_new_tokens)
    _check_range("min_new_tokens", params.min_new_tokens, 0, 1 << 31)
    if params.sampling_seed is not None:
        _check_range("sampling_seed", params.sampling_seed, -(1 << 63), (1 << 63) - 1)
    if len(params.logit_bias) > MAX_LOGIT_BIAS:
        raise RequestError(
            f"logit_bias has {len(params.logit_bias)} entries, the limit is {MAX_LOGIT_BIAS}",
            code="out_of_range",
            param="logit_bias",
        )
    _check_tokens(list(params.logit_bias), vocab_size, "logit_bias")
    for bias in params.logit_bias.values():
        _check_range("logit_bias", bias, -100.0, 100.0)
    _check_tokens(list(params.stop_token_ids), vocab_size, "stop_token_ids")


def _check_logprobs(spec: LogprobParams, prompt: int, vocab_size: int) -> None:
    _check_range("top_logprobs", spec.top_n, 0, min(MAX_TOP_LOGPROBS, vocab_size))
    _check_tokens(list(spec.token_ids), vocab_size, "token_ids_logprob")
    _check_range("token_ids_logprob", len(spec.token_ids), 0, MAX_LOGIT_BIAS)
    if spec.prompt_start is not None:
        _check_range("logprob_start_len", spec.prompt_start, 0, prompt)
