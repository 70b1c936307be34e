"""Random cases, each from one seed: a configuration, and requests that arrive and leave over time."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import msgspec

from tests.sim.grammar import BAD, BREAKS
from tests.sim.toy_lm import NUM_SAMPLED, VOCAB_SIZE, generate
from trunkline.config.schema import SchedulerConfig
from trunkline.messages import AddRequest, PauseMode
from trunkline.types import (
    CacheKey,
    GrammarSpec,
    LogprobParams,
    Pooling,
    SamplingParams,
    SessionTurn,
    Thinking,
)


@dataclass(slots=True)
class Submission:
    """One request and what happens to it. `abort_after`: steps after arrival; `again`: sent under the same id
    right after the abort."""

    message: AddRequest
    at: int  # step of arrival
    received: int = 0
    fails_at: int = -1
    abort_after: int | None = None
    again: AddRequest | None = None


@dataclass(slots=True)
class Case:
    """`exact`: a prompt tree in whole blocks and nothing else going on, so that the number of prompt tokens
    computed is known in advance."""

    seed: int
    scheduler: SchedulerConfig
    num_pages: int
    page_size: int
    prefix_cache: bool
    num_drafts: int
    needs_host_seq_lens: bool
    submissions: list[Submission]
    flush_at: list[int] = field(default_factory=list)
    abort_all_at: int | None = None
    shutdown_at: int | None = None
    stats_at: int | None = None
    breaks: dict[int, str] = field(default_factory=dict)  # step -> call of the worker that raises
    most_at_once: int | None = None  # a registered constraint: tokens of one request in one step
    pauses: bool = False  # a registered constraint: a request may run nothing now and then
    exact: bool = False
    jump_forward: bool = True
    mask_beside: bool = False
    compile_steps: int = 0  # most steps that a grammar takes to compile
    session_ends: dict[int, str] = field(default_factory=dict)  # step -> session
    halts: dict[int, PauseMode] = field(default_factory=dict)  # step -> generation is paused and goes on


def fits_context(message: AddRequest, max_context: int) -> bool:
    prompt, limit = len(message.token_ids), message.params.max_new_tokens
    return 0 < prompt < max_context and prompt + (limit or 0) <= max_context


def pages_needed(message: AddRequest, page_size: int, max_context: int) -> int:
    """Pages that a request must be able to hold: with no limit, what one token of output takes."""
    limit = message.params.max_new_tokens
    longest = len(message.token_ids) + (1 if limit is None else limit)
    return -(-longest // page_size)


def make_case(seed: int) -> Case:
    rng = Random(seed)
    if rng.random() < 0.08:
        return _exact_case(seed, rng)
    page_size = rng.choice((1, 1, 2, 3, 4, 4, 5, 8, 16))
    max_context = rng.choice((48, 64, 96, 160))
    num_drafts = rng.choice((0, 0, 1, 2, 3))
    crowded = rng.random() < 0.3  # short prompts, long outputs, few pages, nothing reserved: much preemption
    submissions = _submissions(rng, page_size, max_context, crowded)
    messages = [message for entry in submissions for message in _messages(entry)]
    fitting = [message for message in messages if fits_context(message, max_context)]
    need = max((pages_needed(message, page_size, max_context) for message in fitting), default=1)
    max_running = rng.choice((3, 4, 8) if crowded else (1, 2, 3, 4, 8))
    spare = (
        rng.choice((0, 1, need // 2, need))
        if crowded
        else rng.choice((0, 1, need // 2, need, 3 * need, 12 * need))
    )
    last = max(entry.at for entry in submissions)
    sessions = Random(f"sessions of {seed}")  # its own, so that older seeds still make their cases
    ends = _enter_sessions(sessions, submissions, last, max_context) if sessions.random() < 0.3 else {}
    urgency = Random(f"priorities of {seed}")
    return Case(
        seed=seed,
        scheduler=SchedulerConfig(
            preempt_above=urgency.choice((0, 1)) if urgency.random() < 0.3 else None,
            low_priority_first=urgency.random() < 0.1,
            max_running=max_running,
            step_tokens=max(max_running, rng.choice((1, 2, 3, 5, 8, 16, 32, 256))),
            max_context=max_context,
            mix=rng.choice(("always", "always", "never")),
            policy=rng.choice(("fcfs", "lpm")),
            conservativeness=0.0 if crowded else rng.choice((0.0, 0.3, 1.0, 2.0)),
            depth=rng.choice((0, 1, 1, 2)),
            max_queued=rng.choice((1, 3)) if rng.random() < 0.05 else 1024,
            prefill_wait=rng.random() < 0.6,
        ),
        num_pages=need + spare,
        page_size=page_size,
        prefix_cache=rng.random() < 0.85,
        num_drafts=num_drafts,
        needs_host_seq_lens=rng.random() < 0.1,
        submissions=submissions,
        flush_at=sorted(rng.randrange(last + 30) for _ in range(rng.choice((0, 0, 1, 3)))),
        abort_all_at=rng.randrange(1, last + 20) if rng.random() < 0.05 else None,
        most_at_once=rng.choice((1, 2, 5)) if rng.random() < 0.1 else None,
        shutdown_at=rng.randrange(1, last + 20) if rng.random() < 0.03 else None,
        stats_at=rng.randrange(last + 20) if rng.random() < 0.2 else None,
        breaks=_breaks(rng) if rng.random() < 0.06 else {},
        pauses=rng.random() < 0.05,
        jump_forward=rng.random() < 0.8,
        mask_beside=rng.choice((False, False, False, True)),
        compile_steps=rng.choice((0, 0, 1, 6)),
        session_ends=ends,
        halts=_halts(urgency, last),
    )


def _halts(rng: Random, last: int) -> dict[int, PauseMode]:
    modes: tuple[PauseMode, ...] = ("retract", "retract", "in_place", "abort")
    count = rng.randrange(1, 5) if rng.random() < 0.2 else 0
    return {rng.randrange(last + 20): rng.choice(modes) for _ in range(count)}


def _enter_sessions(
    rng: Random, submissions: list[Submission], last: int, max_context: int
) -> dict[int, str]:
    """Put requests into sessions, where each follows an earlier one as far as their tokens are the same;
    returns when some of those end, perhaps while they are used."""
    names = ("s0", "s1", "s2")[: rng.randrange(1, 4)]
    before: list[tuple[SessionTurn, list[int]]] = []
    for number, entry in enumerate(submissions, 1):
        if rng.random() < 0.7:
            turn, tokens = SessionTurn(rng.choice(names), number), entry.message.token_ids
            others = [other for other in before if other[0].session == turn.session]
            if others:
                parent, known = max(others, key=lambda other: _common(other[1], tokens))
                turn = SessionTurn(turn.session, number, parent.number, _common(known, tokens))
            entry.message = msgspec.structs.replace(entry.message, turn=turn)
            if fits_context(entry.message, max_context):  # others are refused
                before.append((turn, tokens + generate(entry.message, max_context).token_ids))
    return {rng.randrange(last + 30): rng.choice(names) for _ in range(rng.randrange(4))}


def _common(first: list[int], second: list[int]) -> int:
    ends = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(ends, min(len(first), len(second)))


def _breaks(rng: Random) -> dict[int, str]:
    """One or two steps that fail; three in a row would end the engine."""
    return {rng.randrange(20): rng.choice(("forward", "sample", "result")) for _ in range(rng.choice((1, 2)))}


def _messages(entry: Submission) -> list[AddRequest]:
    return [entry.message] if entry.again is None else [entry.message, entry.again]


def _submissions(rng: Random, page_size: int, max_context: int, crowded: bool) -> list[Submission]:
    """Prompts from a random tree of stems, some of which go on from another request's output."""
    longest = rng.choice((3, 6, 16)) if crowded else max_context - 12
    keys = [CacheKey(), CacheKey(salt="b"), CacheKey(adapter="x")][: rng.choice((1, 1, 1, 2, 3))]
    stems: list[list[int]] = [[]]
    for _ in range(rng.randrange(5)):
        edge = rng.choice((1, page_size, 2 * page_size, 3 * page_size + 1, 16, rng.randrange(1, 24)))
        stems.append((rng.choice(stems) + _tokens(rng, edge))[:longest])
    found: list[Submission] = []
    spread = rng.choice((0, 1) if crowded else (0, 1, 4, 12))
    at = 0
    guided = rng.choice((0.0, 0.0, 0.5, 1.0))  # share of requests with a grammar
    count = rng.choice((3, 5, 8) if crowded else (1, 2, 4, 6, 8, 10))
    for index in range(100 if rng.random() < 0.002 else count):
        if found and rng.random() < 0.15:
            before = rng.choice(found)
            key = before.message.cache_key
            prompt = before.message.token_ids + generate(before.message, max_context).token_ids
            prompt = prompt[: max_context - 20] + _tokens(rng, rng.randrange(1, 4))
        else:
            key = rng.choice(keys)
            prompt = rng.choice(stems) + _tokens(rng, rng.choice((0, 1, 2, page_size, rng.randrange(8))))
            prompt = prompt or _tokens(rng, 1)
        entry = Submission(_message(rng, f"r{index}", prompt, key, crowded), at)
        if guided > rng.random():
            entry.message = _guide(rng, entry.message)
        elif rng.random() < 0.12:
            entry.message = _pool(rng, entry.message)
        _complicate(rng, entry, max_context)
        if entry.again is not None and guided > rng.random():
            entry.again = _guide(rng, entry.again)
        found.append(entry)
        at += rng.randrange(spread + 1)
    for entry in list(found):
        if rng.random() < 0.03:
            entry.message = _impossible(rng, entry.message, max_context)
        elif rng.random() < 0.03:  # a second one of its name, most often while it is live
            found.append(Submission(entry.message, entry.at + rng.randrange(4)))
    return found


def _tokens(rng: Random, count: int) -> list[int]:
    """Mostly two symbols, so that unrelated prompts share prefixes by chance too."""
    if rng.random() < 0.5:
        return [rng.randrange(2) for _ in range(count)]
    return [rng.randrange(VOCAB_SIZE) for _ in range(count)]


def _message(rng: Random, rid: str, prompt: list[int], key: CacheKey, crowded: bool = False) -> AddRequest:
    stops = tuple(rng.randrange(NUM_SAMPLED) for _ in range(rng.choice((0, 0, 0, 0 if crowded else 1, 2))))
    limit = rng.choice((8, 14, 20, 20) if crowded else (0, 1, 2, 4, 8, 12, 20))
    logprobs = None
    if rng.random() < 0.3:
        start = rng.randrange(len(prompt) + 1) if rng.random() < 0.6 else None
        logprobs = LogprobParams(
            prompt_start=start, top_n=rng.choice((0, 0, 2)), token_ids=(3, 5) if rng.random() < 0.3 else ()
        )
    return AddRequest(
        rid=rid,
        token_ids=prompt,
        params=SamplingParams(
            max_new_tokens=None if rng.random() < 0.04 else limit,
            min_new_tokens=rng.choice((0, 0, 0, min(3, limit), limit)),
            presence_penalty=rng.choice((0.0, 0.0, 0.5)),
            sampling_seed=rng.choice((None, 1, 2)),
            stop_token_ids=stops,
            ignore_eos=crowded or rng.random() < 0.4,
        ),
        logprobs=logprobs,
        cache_key=key,
        priority=rng.choice((0, 0, 0, 0, 1, -1)),
    )


def _guide(rng: Random, message: AddRequest) -> AddRequest:
    """With a grammar, reasoning before it, or only a bound on reasoning."""
    source = rng.choice(("a", "b", "c", "d", "e")) if rng.random() < 0.93 else rng.choice((BAD, BREAKS))
    grammar = GrammarSpec("regex", source) if rng.random() < 0.9 else None
    thinking = None
    if rng.random() < 0.3:
        end = tuple(rng.randrange(2, 8) for _ in range(rng.choice((1, 1, 2, 3))))
        thinking = Thinking(end, rng.choice((None, 0, 1, 3, 6)))
    return msgspec.structs.replace(message, grammar=grammar, thinking=thinking)


def _pool(rng: Random, message: AddRequest) -> AddRequest:
    """The same prompt, for a vector."""
    params = msgspec.structs.replace(message.params, max_new_tokens=0, min_new_tokens=0)
    kind: Pooling = rng.choice(("last", "mean"))
    return msgspec.structs.replace(message, params=params, logprobs=None, pooling=kind)


def _complicate(rng: Random, entry: Submission, max_context: int) -> None:
    """Remote starts, rows that break, aborts, and ids that are used again."""
    message = entry.message
    start = message.logprobs.prompt_start if message.logprobs else None
    most = len(message.token_ids) - 1 if start is None else min(start, len(message.token_ids) - 1)
    if message.pooling == "mean":
        most = 0  # it needs the hidden states of all positions
    if most > 0 and rng.random() < 0.12:
        entry.received = rng.randrange(1, most + 1)
    if rng.random() < 0.05:
        entry.fails_at = rng.randrange(6)
    if rng.random() < 0.15:
        entry.abort_after = rng.choice((0, 1, 2, 3, 5, 8, 13, 21))
        if rng.random() < 0.4:
            shared = message.token_ids[: rng.randrange(len(message.token_ids) + 1)]
            prompt = (shared + _tokens(rng, rng.randrange(1, 5)))[: max_context - 21]
            entry.again = _message(rng, message.rid, prompt, message.cache_key)


def _impossible(rng: Random, message: AddRequest, max_context: int) -> AddRequest:
    kind = rng.randrange(3)
    if kind == 0:
        return msgspec.structs.replace(message, token_ids=[])
    if kind == 1:
        return msgspec.structs.replace(message, token_ids=[2] * max_context)
    return msgspec.structs.replace(message, params=SamplingParams(max_new_tokens=max_context))


def _exact_case(seed: int, rng: Random) -> Case:
    page_size = rng.choice((1, 2, 3, 4, 5, 8, 16))
    block = -(-16 // page_size) * page_size  # what one request waits for another to compute
    stems: list[list[int]] = [[]]
    heads = iter(
        range(NUM_SAMPLED, VOCAB_SIZE)
    )  # edges start with tokens of their own: nothing else is shared
    for _ in range(rng.randrange(1, 5)):
        rest = [rng.randrange(NUM_SAMPLED, VOCAB_SIZE) for _ in range(block * rng.choice((1, 1, 2)) - 1)]
        stems.append([*rng.choice(stems), next(heads), *rest])
    submissions = []
    at = 0
    for index in range(rng.randrange(2, 9)):
        tail = [next(heads)] + [
            rng.randrange(NUM_SAMPLED, VOCAB_SIZE) for _ in range(rng.randrange(block - 1))
        ]
        params = SamplingParams(max_new_tokens=rng.choice((1, 4, 12)), ignore_eos=rng.random() < 0.5)
        message = AddRequest(rid=f"r{index}", token_ids=rng.choice(stems) + tail, params=params)
        submissions.append(Submission(message, at))
        at += rng.choice((0, 0, 1, 3))
    max_running = rng.choice((2, 4, 8))
    return Case(
        seed=seed,
        scheduler=SchedulerConfig(
            max_running=max_running,
            step_tokens=max(max_running, rng.choice((3, 7, 16, 40, 256))),
            max_context=256,
            mix=rng.choice(("always", "never")),
            policy=rng.choice(("fcfs", "lpm")),
            depth=rng.choice((0, 1, 2)),
            prefill_wait=True,
        ),
        num_pages=sum(pages_needed(entry.message, page_size, 256) for entry in submissions),
        page_size=page_size,
        prefix_cache=True,
        num_drafts=rng.choice((0, 3)),
        needs_host_seq_lens=False,
        submissions=submissions,
        exact=True,
    )


def distinct_prompt_tokens(case: Case) -> int:
    """Tokens of the prompt tree of an exact case: every edge once."""
    block = -(-16 // case.page_size) * case.page_size
    edges: set[tuple[int, ...]] = set()
    tails = 0
    for entry in case.submissions:
        prompt = entry.message.token_ids
        whole = (len(prompt) - 1) // block * block
        edges.update(tuple(prompt[:end]) for end in range(block, whole + 1, block))
        tails += len(prompt) - whole
    return len(edges) * block + tails
