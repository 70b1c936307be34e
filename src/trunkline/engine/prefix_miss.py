"""Prefix-miss reports: the cache's facts in words, with the text of the tokens they are about."""

from __future__ import annotations

from typing import Any

import msgspec

from trunkline.text.tokenizer import Tokenizer
from trunkline.types import PrefixMiss


def miss_report(miss: PrefixMiss, tokenizer: Tokenizer) -> dict[str, Any]:
    """What `meta_info.prefix_miss` holds."""
    report = {
        "reason": miss.reason,
        "explanation": _explain(miss, tokenizer),
        "prompt_tokens": miss.prompt_tokens,
        "matched_tokens": miss.matched,
        "missed_tokens": miss.missed,
        "position": miss.position,
        "page_size": miss.page_size,
        "branches": miss.branches,
        "prompt": _shown(miss.wanted, tokenizer),
        "cache": _shown(miss.found, tokenizer),
    }
    if miss.elsewhere:
        report["other_namespaces"] = [msgspec.to_builtins(one) for one in miss.elsewhere]
    return report


def _shown(token_ids: tuple[int, ...], tokenizer: Tokenizer) -> dict[str, Any] | None:
    if not token_ids:
        return None
    text = tokenizer.decode(list(token_ids), skip_special_tokens=False)
    return {"token_ids": list(token_ids), "text": text}


def _explain(miss: PrefixMiss, tokenizer: Tokenizer) -> str:
    said = {
        "whole_prompt": "everything but the last token, which is always computed, came from the cache",
        "page_tail": f"what is left does not fill a page of {miss.page_size} tokens, the unit of sharing",
        "prompt_logprobs": "log-probabilities of the prompt were asked for: their positions are computed",
        "disabled": "the prefix cache is off (--disable-radix-cache)",
        "empty": "nothing is cached in this request's namespace",
        "end_of_branch": "the cache ends there: no request has gone on from this prefix, or none has "
        "finished a page behind it yet",
        "evicted": "the next page was cached once and was evicted for lack of memory "
        "(--max-total-tokens, --kv-memory)",
        "flushed": "the next page was cached until the cache was flushed",
        "other_tokens": _difference(miss, tokenizer),
    }[miss.reason]
    behind = f"{miss.matched} of {miss.prompt_tokens} prompt tokens matched; {said}"
    if miss.elsewhere:
        best = miss.elsewhere[0]
        which = f"weight version {best.weight_version!r}" + (
            f", adapter {best.adapter!r}" * bool(best.adapter)
        )
        salt = "" if best.salted else ", without a salt"
        behind += f". The namespace of {which}{salt} holds {best.matched} of them"
    return behind


def _difference(miss: PrefixMiss, tokenizer: Tokenizer) -> str:
    inside = miss.position - miss.matched
    at = f"at token {miss.position}" + (f", {inside} tokens into a page," * bool(inside))
    wanted = _text(miss.wanted[:4], tokenizer)
    branches = "what is cached" if miss.branches == 1 else f"each of {miss.branches} cached continuations"
    if not miss.found:
        return f"{at} the prompt ({wanted}) differs from {branches}"
    return (
        f"{at} the prompt has {wanted} where the nearest cached text has {_text(miss.found[:4], tokenizer)}"
    )


def _text(token_ids: tuple[int, ...], tokenizer: Tokenizer) -> str:
    return repr(tokenizer.decode(list(token_ids), skip_special_tokens=False))
