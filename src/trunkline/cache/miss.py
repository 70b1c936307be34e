"""Why a prompt missed the prefix cache: facts about the place where it left the tree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from trunkline.types import CacheKey, Elsewhere, MissReason, PrefixMiss

MAX_LOST = 32  # continuations that a node remembers after they were evicted
MAX_LOST_ROOTS = 256  # namespaces whose evicted beginnings are remembered
MAX_BRANCHES = 512  # continuations that are compared with a prompt
SHOWN = 16  # tokens of the prompt and of the tree that a report holds
MAX_ELSEWHERE = 8  # other namespaces that are looked into

Loss = Literal["evicted", "flushed"]


@dataclass(slots=True)
class Lost:
    """First pages that once continued a node, by hash, with why they went; the oldest are forgotten."""

    pages: dict[int, Loss] = field(default_factory=dict)

    def note(self, page: Sequence[int], why: Loss) -> None:
        key = hash(tuple(page))
        self.pages.pop(key, None)
        if len(self.pages) >= MAX_LOST:
            del self.pages[next(iter(self.pages))]
        self.pages[key] = why

    def why(self, page: Sequence[int]) -> Loss | None:
        return self.pages.get(hash(tuple(page))) if self.pages else None


def explain(
    tokens: Sequence[int],
    limit: int,
    matched: int,
    page_size: int,
    branches: Sequence[Sequence[int]],
    lost: Lost,
    show: bool,
) -> PrefixMiss:
    """The report for a prompt whose `matched` first tokens are cached, and no whole page more.

    `branches`: the beginnings of what the tree holds behind them. `limit`: most tokens a match may have.
    `show`: the tree's tokens may be part of the report.
    """
    nearest, same = _nearest(tokens[matched : matched + page_size], branches)
    gone = lost.why(tokens[matched : matched + page_size])
    reason = _reason(len(tokens), limit, matched, page_size, gone, len(branches), same)
    position = matched + (same if reason in ("other_tokens", "page_tail") else 0)
    differs = reason == "other_tokens"
    usable = min(limit, len(tokens) - 1) // page_size * page_size
    return PrefixMiss(
        reason=reason,
        prompt_tokens=len(tokens),
        matched=matched,
        position=position,
        page_size=page_size,
        missed=max(0, usable - matched),
        branches=len(branches),
        wanted=tuple(tokens[position : position + SHOWN]),
        found=tuple(nearest[same : same + SHOWN]) if differs and show else (),
    )


def _reason(
    length: int, limit: int, matched: int, page_size: int, gone: Loss | None, branches: int, same: int
) -> MissReason:
    if limit - matched < page_size:
        if limit < length - 1 and length - 1 - matched >= page_size:
            return "prompt_logprobs"
        return "whole_prompt" if matched == length - 1 else "page_tail"
    if gone is not None:
        return gone
    if branches:
        return "other_tokens"
    return "end_of_branch" if matched else "empty"


def _nearest(page: Sequence[int], branches: Sequence[Sequence[int]]) -> tuple[Sequence[int], int]:
    """The branch that shares most leading tokens with `page`, and how many."""
    best: tuple[Sequence[int], int] = ((), 0)
    for branch in branches:
        same = next((i for i, (a, b) in enumerate(zip(page, branch, strict=False)) if a != b), len(page))
        if same > best[1] or not best[0]:
            best = branch, same
    return best


def elsewhere(
    own: CacheKey, keys: Iterable[CacheKey], matched: int, match: Callable[[CacheKey], int]
) -> tuple[Elsewhere, ...]:
    """Namespaces that hold more than `matched` tokens, the best first.

    Never one with another salt: whether another tenant has sent a prompt is nobody's business. The shared
    namespace without a salt may be named: anybody can ask it.
    """
    allowed = (key for key in keys if key != own and key.salt in (own.salt, ""))
    found = ((key, match(key)) for key in islice(allowed, MAX_ELSEWHERE))
    more = sorted(((key, length) for key, length in found if length > matched), key=lambda one: -one[1])
    return tuple(
        Elsewhere(
            adapter=key.adapter, weight_version=key.weight_version, salted=bool(key.salt), matched=length
        )
        for key, length in more
    )
