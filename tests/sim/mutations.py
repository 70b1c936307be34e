"""Bugs planted in the real classes at run time, each of which the simulation must catch.

A mutation wraps a method; it holds no copy of the method's code. One whose target is gone fails loudly, and
so does one whose wrapper no longer fits: AttributeError, NameError and TypeError do not count as caught.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from tests.sim.cases import make_case
from tests.sim.runner import describe, run_case, without_logging
from trunkline.cache import PrefixCache
from trunkline.engine.core import EngineCore
from trunkline.scheduler import guide as guide_module
from trunkline.scheduler import scheduler as scheduler_module
from trunkline.scheduler.claims import PrefixClaims
from trunkline.scheduler.guide import Guide
from trunkline.scheduler.request import Request
from trunkline.scheduler.scheduler import Scheduler
from trunkline.types import CacheKey

Wrapper = Callable[..., Any]  # called with the original function, then the arguments of the call


@dataclass(frozen=True)
class Mutation:
    """`targets`: (class or module, name of a method, property or function), each replaced by
    `wrapper(original, *args)`."""

    name: str
    bug: str
    targets: tuple[tuple[Any, str], ...]
    wrapper: Wrapper


class StaleMutation(Exception):
    """The code has moved on: the mutation must be adapted."""


@contextmanager
def planted(mutation: Mutation) -> Iterator[None]:
    """The bug is in the classes inside the `with` block."""
    saved: list[tuple[Any, str, Any]] = []
    try:
        for owner, name in mutation.targets:
            if name not in vars(owner):
                raise StaleMutation(f"{mutation.name}: {owner.__name__}.{name} does not exist any more")
            original = vars(owner)[name]
            saved.append((owner, name, original))
            setattr(owner, name, _wrapped(original, mutation.wrapper))
        yield
    finally:
        for owner, name, original in saved:
            setattr(owner, name, original)


def _wrapped(original: Any, wrapper: Wrapper) -> Any:
    if isinstance(original, property):
        return property(lambda self: wrapper(original.fget, self))
    if isinstance(original, staticmethod):
        return staticmethod(lambda *args: wrapper(original.__func__, *args))
    return lambda *args, **kwargs: wrapper(original, *args, **kwargs)


def catch(mutation: Mutation, cases: int, seed: int = 0, *, strict: bool = True) -> tuple[int, str] | None:
    """(cases until caught, what caught it), or None when `cases` cases from `seed` pass with the bug in.

    With `strict=False` only what clients see can catch it.
    """
    with planted(mutation):
        for index in range(cases):
            try:
                with without_logging():
                    run_case(make_case(seed + index), strict=strict)
            except (AttributeError, NameError, TypeError) as error:
                raise StaleMutation(f"{mutation.name}: {error!r}") from error
            except Exception as error:
                return index + 1, describe(error)
    return None


# ---------------------------------------------------------------------- the cache
def _publish_up_to(extra: Callable[[PrefixCache], int]) -> Wrapper:
    def wrapper(original: Any, self: PrefixCache, lease: Any, tokens: list[int], num_tokens: int) -> Any:
        return original(self, lease, tokens, num_tokens + extra(self))

    return wrapper


def _any_key(original: Any, self: PrefixCache, key: CacheKey, *args: Any) -> Any:
    return original(self, CacheKey(), *args)


def _publish_less(original: Any, self: PrefixCache, lease: Any, tokens: list[int], num_tokens: int) -> Any:
    return original(self, lease, tokens, max(0, num_tokens - self.page_size))


def _first_page_decides(
    original: Any, self: PrefixCache, node: Any, tokens: list[int], at: int, limit: int
) -> int:
    return min(len(node.pages), (limit - at) // self.page_size)


def _release_frees_shared(original: Any, self: PrefixCache, lease: Any) -> None:
    self._pool.give(lease.pages[: lease.num_shared])
    original(self, lease)


def _ends_silently(original: Any, self: PrefixCache, session: str) -> None:
    for place in self._kept.pop(session, {}).values():
        place.node.sessions -= {session}


def _trusts_moved_ends(original: Any, self: PrefixCache, key: CacheKey, limit: int, turn: Any) -> Any:
    place = None if turn is None else self._kept.get(turn.session, {}).get(turn.follows)
    if place is None or place.key != key or place.num_pages * self.page_size > limit:
        return original(self, key, limit, turn)
    return place.node, place.num_pages


def _release_leaks(original: Any, self: PrefixCache, lease: Any) -> None:
    lease.pages = lease.pages[: max(lease.num_shared, len(lease.pages) - 1)]
    original(self, lease)


def _acquire_unlocked(original: Any, self: PrefixCache, *args: Any) -> Any:
    lease = original(self, *args)
    self._unlock(lease.node)
    return lease


# ---------------------------------------------------------------------- the scheduler
def _rejected(step: Any, result: Any) -> int:
    return 1 + step.num_drafts - len(result.token_ids) if step.samples else 0


def _computed_stays(original: Any, self: Scheduler, request: Request, step: Any, result: Any) -> Any:
    outputs = original(self, request, step, result)
    if request.row >= 0:
        request.computed += _rejected(step, result)
    return outputs


def _pending_stays(original: Any, self: Scheduler, request: Request, step: Any, result: Any) -> Any:
    outputs = original(self, request, step, result)
    if request.row >= 0:
        request.pending += _rejected(step, result)
    return outputs


def _settles_drafts(original: Any, self: Scheduler, request: Request, step: Any, result: Any) -> Any:
    request.settled += _rejected(step, result)
    return original(self, request, step, result)


def _publishes_in_flight(original: Any, self: Scheduler, request: Request) -> None:
    settled, request.settled = request.settled, request.computed
    original(self, request)
    request.settled = settled


def _no_epoch(original: Any, self: Scheduler, plan: Any) -> Any:
    step, scheduled = original(self, plan)
    return step, [(request, request.epoch) for request, _ in scheduled]


def _results_by_row(original: Any, self: Scheduler, plan: Any) -> Any:
    step, scheduled = original(self, plan)
    now = {request.row: request for request in self._running}
    found = [now.get(row.row, request) for row, (request, _) in zip(plan.rows, scheduled, strict=True)]
    return step, [
        (request, request.epoch if request.row >= 0 else epoch)
        for request, (_, epoch) in zip(found, scheduled, strict=True)
    ]


def _keeps_computed(original: Any, self: Scheduler, request: Request) -> None:
    computed = request.computed
    original(self, request)
    request.computed = computed


def _keeps_received(original: Any, self: Scheduler, request: Request) -> None:
    received = request.received
    original(self, request)
    request.received = received


def _no_budget(original: Any, self: Scheduler, request: Request, budget: int, *args: Any) -> Any:
    return original(self, request, 1 << 30, *args)


def _drafts_displace(original: Any, self: Scheduler, request: Request, budget: int, *args: Any) -> Any:
    return original(self, request, budget)


def _start_off_by_one(original: Any, self: Scheduler, *args: Any) -> Any:
    before = len(self._new_pages)
    result = original(self, *args)
    self._new_pages[before:] = [
        msgspec.structs.replace(entry, start=max(0, entry.start - 1)) for entry in self._new_pages[before:]
    ]
    return result


def _no_swap(original: Any, self: Scheduler, request: Request) -> None:
    before = len(self._new_pages)
    original(self, request)
    del self._new_pages[before:]


def _always_samples(original: Any, self: Scheduler, *args: Any) -> Any:
    plan = original(self, *args)
    return msgspec.structs.replace(
        plan, rows=[msgspec.structs.replace(row, samples=True) for row in plan.rows]
    )


def _forgets_retires(original: Any, self: Scheduler, request: Request) -> None:
    original(self, request)
    self._retires.clear()


def _keeps_growth(original: Any, self: Scheduler, request: Request) -> None:
    growth = list(self._new_pages)
    original(self, request)
    self._new_pages = growth


def _stops_at_last(original: Any, request: Request, token_ids: list[int]) -> Any:
    kept, reason = original(request, token_ids)
    return (len(token_ids), reason) if reason is not None and reason.kind == "stop" else (kept, reason)


def _one_kind(original: Any, self: Scheduler) -> Any:
    return original(self)[:1]


def _never(original: Any, *args: Any) -> bool:
    return False


def _nothing(original: Any, *args: Any) -> None:
    return None


def _latest_first(original: Any, waiting: Any, *args: Any) -> Any:
    return list(original(waiting, *args))[::-1]


def _admits_anything(original: Any, message: Any, *args: Any) -> int:
    return int(message.params.max_new_tokens or 0)


def _runs_ahead(original: Any, self: EngineCore, down_to: int, *args: Any) -> Any:
    return original(self, max(1, down_to), *args)


def _whole_prompt(original: Any, self: Request) -> int:
    return len(self.tokens)


def _ignores_logprobs(original: Any, self: Request) -> int:
    return len(self.tokens) - 1


def _ignores_pooling(original: Any, self: Request) -> int:
    return original(self) or len(self.tokens) - 1  # type: ignore[no-any-return]


def _pooling_forgotten(original: Any, request: Request) -> Any:
    admit = original(request)
    return msgspec.structs.replace(admit, pooling=None) if request.retractions else admit


def _reports_again(original: Any, self: Request) -> Any:
    said, self.prompt_logprobs = self.prompt_logprobs, []
    position = original(self)
    self.prompt_logprobs = said
    return position


def _drafts_always(original: Any, self: Scheduler, chosen: Any) -> Any:
    plan = original(self, chosen)
    for request in chosen:
        request.drafts = self.num_drafts
    return plan


# ---------------------------------------------------------------------- grammars
def _during(change: Callable[[Scheduler, Request], tuple[Any, str, Any]]) -> Wrapper:
    """Change (owner, attribute, value) while a method that works on a request runs."""

    def wrapper(original: Any, self: Scheduler, request: Request, *args: Any) -> Any:
        owner, name, value = change(self, request)
        before = getattr(owner, name)
        setattr(owner, name, value)
        try:
            return original(self, request, *args)
        finally:
            setattr(owner, name, before)

    return wrapper


def _announces_no_masks(original: Any, self: Scheduler, chosen: Any) -> Any:
    return msgspec.structs.replace(original(self, chosen), needs_prev_tokens=False)


def _masks_too_early(original: Any, self: Scheduler, plan: Any) -> Any:
    promised = {request: request.pending for request in self._running if request.pending > 1}
    for request in promised:
        request.pending = 1
    rows = original(self, plan)
    for request, pending in promised.items():
        request.pending = pending
    return rows


def _promise_stands(original: Any, self: Scheduler, request: Request) -> Any:
    pending = request.pending
    reason = original(self, request)
    request.pending, request.withdrawn = pending, False
    return reason


def _tells_nobody(original: Any, self: Scheduler, request: Request) -> Any:
    before = len(self._appends)
    reason = original(self, request)
    del self._appends[before:]
    return reason


def _matcher_stays(original: Any, self: Scheduler, request: Request) -> Any:
    guide = request.guide
    if guide is None or guide._matcher is None:
        return original(self, request)
    matcher = guide._matcher.fork()
    reason = original(self, request)
    guide._matcher = matcher
    return reason


def _keeps_appends(original: Any, self: Scheduler, request: Request) -> None:
    appends = list(self._appends)
    original(self, request)
    self._appends = appends


def _guide_starts_again(original: Any, self: Scheduler, request: Request) -> None:
    original(self, request)
    guide = request.guide
    if guide is not None and guide._matcher is not None:
        matcher = guide._matcher.fork()
        matcher.rollback(len(matcher.tokens))  # type: ignore[attr-defined]  # a ToyMatcher
        guide._matcher = matcher


def _may_end_in_thought(original: Any, self: Guide, *args: Any) -> None:
    eos, self._eos_ids = self._eos_ids, ()
    original(self, *args)
    self._eos_ids = eos


def _minimum_is_absolute(original: Any, self: Guide, row: Any, banned: Any) -> None:
    original(self, row, ())
    row[:] = guide_module._without(row, banned)


def _minimum_forgotten(original: Any, self: Guide, row: Any, banned: Any) -> None:
    original(self, row, ())


def _for_the_id(original: Any, self: Scheduler, request: Request, guide: Any) -> Any:
    return original(self, self._requests.get(request.rid, request), guide)


MUTATIONS = (
    Mutation(
        "turn_goes_on_from_a_moved_end",
        "a turn is matched from where another ended, though that edge was cut or lengthened since",
        ((PrefixCache, "_begin"),),
        _trusts_moved_ends,
    ),
    Mutation(
        "session_end_forgets_pages",
        "pages of a session that ended can't be evicted any more",
        ((PrefixCache, "end_session"),),
        _ends_silently,
    ),
    Mutation(
        "masks_not_announced",
        "a plan with constrained rows does not wait for the tokens before",
        ((Scheduler, "_commit"),),
        _announces_no_masks,
    ),
    Mutation(
        "mask_too_early",
        "a mask is made before the token before it is known",
        ((Scheduler, "guided"),),
        _masks_too_early,
    ),
    Mutation(
        "promise_not_withdrawn",
        "what a step in flight samples counts, though it is known already",
        ((Scheduler, "_jump"),),
        _promise_stands,
    ),
    Mutation(
        "append_not_told", "the worker is not told of forced tokens", ((Scheduler, "_jump"),), _tells_nobody
    ),
    Mutation(
        "forced_not_followed",
        "the matcher does not take the forced tokens",
        ((Scheduler, "_jump"),),
        _matcher_stays,
    ),
    Mutation(
        "forced_past_limit",
        "forced tokens exceed max_new_tokens",
        ((Scheduler, "_jump"),),
        _during(lambda scheduler, request: (request, "max_tokens", request.max_tokens + 64)),
    ),
    Mutation(
        "forced_past_stop",
        "forced tokens go on behind a stop token",
        ((Scheduler, "_jump"),),
        _during(lambda scheduler, request: (request, "stops", frozenset())),
    ),
    Mutation(
        "appends_of_the_gone",
        "forced tokens of a request that left are still handed to its row",
        ((Scheduler, "_leave_row"),),
        _keeps_appends,
    ),
    Mutation(
        "guide_starts_again",
        "a preempted request's grammar starts from nothing",
        ((Scheduler, "_preempt"),),
        _guide_starts_again,
    ),
    Mutation(
        "ends_in_thought",
        "an output may end in its reasoning, its grammar unmet",
        ((Guide, "_fill_thinking"),),
        _may_end_in_thought,
    ),
    Mutation(
        "minimum_is_absolute",
        "min_new_tokens leaves a finished grammar without a token",
        ((Guide, "fill_mask"),),
        _minimum_is_absolute,
    ),
    Mutation(
        "minimum_forgotten",
        "a grammar ends an output before min_new_tokens where it could go on",
        ((Guide, "fill_mask"),),
        _minimum_forgotten,
    ),
    Mutation(
        "grammar_of_another",
        "a request gets the grammar of an aborted one with its id",
        ((Scheduler, "unblock"),),
        _for_the_id,
    ),
    Mutation(
        "hit_covers_last_token",
        "a prefix hit may cover the last token",
        ((Request, "prefix_limit"),),
        _whole_prompt,
    ),
    Mutation(
        "hit_covers_logprobs",
        "a hit covers positions whose logprobs are wanted",
        ((Request, "prefix_limit"),),
        _ignores_logprobs,
    ),
    Mutation(
        "hit_covers_pooled",
        "a hit covers positions whose hidden states a mean needs",
        ((Request, "prefix_limit"),),
        _ignores_pooling,
    ),
    Mutation(
        "pooling_forgotten",
        "the worker is not told that a readmitted request wants a vector",
        ((Scheduler, "_admission"),),
        _pooling_forgotten,
    ),
    Mutation(
        "logprobs_twice",
        "a preempted request reports prompt logprobs again",
        ((Request, "next_prompt_logprob"),),
        _reports_again,
    ),
    Mutation(
        "publish_last_token",
        "the last token's page is shared before its KV exists",
        ((PrefixCache, "publish"),),
        _publish_up_to(lambda cache: 1),
    ),
    Mutation(
        "publish_partial_page",
        "a page that is not full is shared",
        ((PrefixCache, "publish"),),
        _publish_up_to(lambda cache: cache.page_size - 1),
    ),
    Mutation(
        "last_page_not_published",
        "the last full page is not shared",
        ((PrefixCache, "publish"),),
        _publish_less,
    ),
    Mutation(
        "publish_in_flight",
        "KV of steps that have not come back is shared",
        ((Scheduler, "_publish"),),
        _publishes_in_flight,
    ),
    Mutation(
        "rejected_drafts_settle",
        "KV of rejected drafts counts as verified",
        ((Scheduler, "_apply"),),
        _settles_drafts,
    ),
    Mutation(
        "computed_not_rolled_back",
        "rejected drafts stay in `computed`",
        ((Scheduler, "_apply"),),
        _computed_stays,
    ),
    Mutation(
        "pending_not_rolled_back",
        "rejected drafts stay in `pending`",
        ((Scheduler, "_apply"),),
        _pending_stays,
    ),
    Mutation(
        "drafts_on_chunks",
        "drafts are assumed after a chunk that does not sample",
        ((Scheduler, "_commit"),),
        _drafts_always,
    ),
    Mutation(
        "no_epoch_check",
        "results of a step from before a preemption are applied",
        ((Scheduler, "_next_in_flight"),),
        _no_epoch,
    ),
    Mutation(
        "results_by_row",
        "results go to whoever has the row now",
        ((Scheduler, "_next_in_flight"),),
        _results_by_row,
    ),
    Mutation(
        "preempted_keeps_computed",
        "a preempted request keeps `computed`",
        ((Scheduler, "_preempt"),),
        _keeps_computed,
    ),
    Mutation(
        "preempted_keeps_received",
        "KV received from elsewhere is expected to survive preemption",
        ((Scheduler, "_preempt"),),
        _keeps_received,
    ),
    Mutation("budget_ignored", "a step may have any number of tokens", ((Scheduler, "_fit"),), _no_budget),
    Mutation(
        "drafts_displace",
        "drafts of one row take the budget of another's token",
        ((Scheduler, "_fit"),),
        _drafts_displace,
    ),
    Mutation(
        "new_pages_off_by_one", "new pages start one entry early", ((Scheduler, "_grow"),), _start_off_by_one
    ),
    Mutation(
        "swap_not_told", "the worker is not told of adopted pages", ((Scheduler, "_publish"),), _no_swap
    ),
    Mutation("samples_on_chunks", "every chunk samples", ((Scheduler, "_commit"),), _always_samples),
    Mutation(
        "retire_forgotten",
        "the worker is not told that a request left its row",
        ((Scheduler, "_leave_row"),),
        _forgets_retires,
    ),
    Mutation(
        "growth_of_the_gone",
        "pages of a request that left are still handed to its row",
        ((Scheduler, "_leave_row"),),
        _keeps_growth,
    ),
    Mutation(
        "stop_within_drafts",
        "tokens after a stop token among accepted drafts are put out",
        ((Scheduler, "_until_end"),),
        _stops_at_last,
    ),
    Mutation(
        "kinds_starve",
        "with mix never, one kind of step waits for the other for ever",
        ((Scheduler, "_kinds"),),
        _one_kind,
    ),
    Mutation(
        "no_prefix_wait",
        "a prefix that another request computes is computed again",
        ((Scheduler, "_is_waiting_for_prefix"),),
        _never,
    ),
    Mutation("claims_kept", "claims of a request that left are kept", ((PrefixClaims, "drop"),), _nothing),
    Mutation(
        "latest_first",
        "the last to come is admitted first",
        ((scheduler_module, "admission_order"),),
        _latest_first,
    ),
    Mutation(
        "never_refused",
        "a request that can't ever fit is queued",
        ((scheduler_module, "output_limit"),),
        _admits_anything,
    ),
    Mutation("always_one_ahead", "depth 0 runs ahead of the host", ((EngineCore, "_retire"),), _runs_ahead),
    Mutation(
        "key_ignored",
        "pages are shared under different cache keys",
        ((PrefixCache, "acquire"), (PrefixCache, "match_length")),
        _any_key,
    ),
    Mutation(
        "first_page_decides",
        "an edge matches when its first page does",
        ((PrefixCache, "_common_pages"),),
        _first_page_decides,
    ),
    Mutation(
        "free_while_shared",
        "releasing a lease frees pages of the tree",
        ((PrefixCache, "release"),),
        _release_frees_shared,
    ),
    Mutation(
        "release_leaks", "a lease's last page is never freed", ((PrefixCache, "release"),), _release_leaks
    ),
    Mutation(
        "hit_not_locked", "a lease does not lock its path", ((PrefixCache, "acquire"),), _acquire_unlocked
    ),
    Mutation(
        "locked_evicted",
        "eviction takes nodes that leases hold",
        ((PrefixCache, "_is_current"),),
        lambda original, entry: bool(entry[3].pages) and not entry[3].children,
    ),
)
