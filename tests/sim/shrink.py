"""Makes a failing case smaller while it keeps failing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import msgspec

from tests.sim.cases import Case, Submission
from tests.sim.runner import run_case, without_logging


def shrink(case: Case) -> Case:
    """The smallest failing case that single changes lead to. Any failure of
    the engine counts, not only the first one."""
    smaller = True
    while smaller:
        smaller = False
        for candidate in _smaller(case):
            if _fails(candidate):
                case, smaller = candidate, True
                break
    return case


def _fails(case: Case) -> bool:
    with without_logging():
        try:
            run_case(case)
        except Exception:
            return True
    return False


def _smaller(case: Case) -> Iterator[Case]:
    entries = case.submissions
    for index in range(len(entries)):
        if len(entries) > 1:
            yield replace(case, submissions=entries[:index] + entries[index + 1 :])
    for changed in (
        replace(case, flush_at=[]),
        replace(case, abort_all_at=None),
        replace(case, shutdown_at=None),
        replace(case, stats_at=None),
        replace(case, breaks={}),
        replace(case, num_drafts=0),
        replace(case, needs_host_seq_lens=False),
        replace(case, most_at_once=None),
        replace(case, pauses=False),
        replace(case, jump_forward=False),
        replace(case, compile_steps=0),
    ):
        if changed != case:
            yield changed
    if case.num_pages > 1:
        yield replace(case, num_pages=case.num_pages - 1)
    for field, plain in (("depth", 0), ("mix", "always"), ("policy", "fcfs"), ("prefill_wait", False)):
        config = msgspec.structs.replace(case.scheduler, **{field: plain})
        if config != case.scheduler:
            yield replace(case, scheduler=config)
    for index, entry in enumerate(entries):
        for changed_entry in _simpler(entry):
            yield replace(case, submissions=[*entries[:index], changed_entry, *entries[index + 1 :]])


def _simpler(entry: Submission) -> Iterator[Submission]:
    message = entry.message
    plain = Submission(message, entry.at)
    for name in ("again", "abort_after", "fails_at", "received"):
        if getattr(entry, name) != getattr(plain, name):
            yield replace(entry, **{name: getattr(plain, name)})
    if message.logprobs is not None:
        yield replace(entry, message=msgspec.structs.replace(message, logprobs=None))
    for name in ("thinking", "grammar", "pooling"):
        if getattr(message, name) is not None:
            yield replace(entry, message=msgspec.structs.replace(message, **{name: None}))
    if message.priority:
        yield replace(entry, message=msgspec.structs.replace(message, priority=0))
    if entry.at:
        yield replace(entry, at=entry.at // 2)
    limit = message.params.max_new_tokens
    if limit:
        params = msgspec.structs.replace(message.params, max_new_tokens=limit - 1, min_new_tokens=0)
        yield replace(entry, message=msgspec.structs.replace(message, params=params))
    if len(message.token_ids) > 1 and not entry.received and message.logprobs is None:
        yield replace(entry, message=msgspec.structs.replace(message, token_ids=message.token_ids[:-1]))
