"""Wire structs between a frontend and the engine core, as tagged msgpack (never pickle).

Text never crosses: prompts arrive as token ids and outputs leave as token ids.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from trunkline.types import (
    CacheKey,
    Explain,
    FinishReason,
    GrammarSpec,
    LogprobParams,
    Pooling,
    PrefixMiss,
    SamplingParams,
    SessionTurn,
    Thinking,
    Timing,
    TokenLogprobs,
)

PauseMode = Literal["abort", "retract", "in_place"]


class AddRequest(msgspec.Struct, frozen=True, tag="add", omit_defaults=True, kw_only=True):
    """Start one completion. `rid` is unique among live requests; a duplicate is refused, not merged."""

    rid: str
    token_ids: list[int]
    params: SamplingParams
    logprobs: LogprobParams | None = None
    cache_key: CacheKey = CacheKey()
    priority: int = 0
    grammar: GrammarSpec | None = None  # what the output must match, behind its reasoning if it has any
    thinking: Thinking | None = None  # the output begins with reasoning
    turn: SessionTurn | None = None  # the pages it leaves behind are evicted after others, until EndSession
    pooling: Pooling | None = None  # the answer is a vector; no token comes out: `max_new_tokens` is 0
    explain_prefix: Explain = "no"  # report where the prompt left the prefix cache
    trace: bool = False  # report each step that computed its prompt


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """End a request in any phase and free all it holds. Unknown ids are ignored. No output follows."""

    rid: str
    all: bool = False  # every request, `rid` ignored; each gets an aborted output


class AbortAnywhere(msgspec.Struct, frozen=True, tag="abort_anywhere"):
    """A client wants a request ended that may be another frontend's: the core passes this on to all others,
    which know what `rid` means to their clients (several completions have one)."""

    rid: str


class EndSession(msgspec.Struct, frozen=True, tag="end_session"):
    """Evict a session's pages like any others from now on. Unknown ones are ignored."""

    session: str


class FlushCache(msgspec.Struct, frozen=True, tag="flush"):
    """Empty the prefix cache. Refused (ok=False) while any request is running, or waiting to run soon."""

    call: str


class Pause(msgspec.Struct, frozen=True, tag="pause"):
    """Run no step until Resume; requests may still come, and wait. Steps in flight are finished first.

    `abort` ends all requests; `retract` takes memory and rows away from those that run, which start again
    later and go on to the same tokens; `in_place` leaves them as they are.
    """

    call: str
    mode: PauseMode


class Resume(msgspec.Struct, frozen=True, tag="resume"):
    call: str


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First message of a frontend; the core answers with Ready."""


class Gone(msgspec.Struct, frozen=True, tag="gone"):
    """A frontend has died: its requests end. Sent by the process that watches over it."""

    frontend: int


class GetStats(msgspec.Struct, frozen=True, tag="stats"):
    call: str


class GetSnapshot(msgspec.Struct, frozen=True, tag="look"):
    """Ask what the engine looks like now. Steps are recorded from the first of these on, while they come."""

    call: str
    nodes: int = 240  # most edges of the radix tree that the answer may hold


class StartProfile(msgspec.Struct, frozen=True, tag="profile", kw_only=True):
    """Profile the steps from now on, `num_steps` of them or until StopProfile."""

    call: str
    folder: str
    name: str
    num_steps: int | None
    activities: list[Literal["CPU", "GPU"]]
    with_stack: bool
    record_shapes: bool


class StopProfile(msgspec.Struct, frozen=True, tag="stopprofile"):
    call: str


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Stop the core: live requests are aborted and told so."""


ToCore = (
    Hello
    | AddRequest
    | Abort
    | AbortAnywhere
    | EndSession
    | FlushCache
    | GetStats
    | GetSnapshot
    | StartProfile
    | StopProfile
    | Pause
    | Resume
    | Gone
    | Shutdown
)


class TokensOut(msgspec.Struct, frozen=True, tag="out", omit_defaults=True, kw_only=True):
    """New tokens of one request. The last message of a request has `finish`; nothing follows it.

    `token_ids` holds only the new tokens (a stop token that ended the request is included).
    When asked for, `logprobs` has one entry per new token, and `prompt_logprobs` comes with the first output.
    """

    rid: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    cached_tokens: int = 0  # prompt tokens taken from the prefix cache
    retractions: int = 0  # times the request was preempted
    forced: list[int] = []  # indices into `token_ids` of those that its grammar dictated
    embedding: bytes = b""  # with the last output of a pooled request: float32 [hidden], little-endian
    timing: Timing | None = None  # with the first output
    prefix_miss: PrefixMiss | None = None  # with the first output, when asked for
    finish: FinishReason | None = None


class Ready(msgspec.Struct, frozen=True, tag="ready", kw_only=True):
    """First message of a core: what it can hold, for validation at the front, and its memory plan."""

    max_context: int  # tokens of prompt + output of one request
    num_pages: int
    page_size: int
    max_running: int
    vocab_size: int
    hidden_size: int = 0  # numbers in the vector of a pooled request
    info: dict[str, str | int | float | bool | None] = {}  # for /server_info and the start-up log


class Stats(msgspec.Struct, frozen=True, tag="stats", kw_only=True):
    """Answer to GetStats: gauges now and counters since start. Counters sum over requests (P20)."""

    call: str
    gauges: dict[str, float]
    counters: dict[str, float]


class TreeEdge(msgspec.Struct, frozen=True, array_like=True):
    """One edge of the radix tree. `number` stays its own for as long as it lives; a root has parent 0 and no
    tokens, one for each namespace."""

    number: int
    parent: int
    tokens: int
    locks: int  # running requests whose prefix it belongs to
    idle: int  # uses of the tree since its last one
    hidden: int  # children that are not in the answer
    head: list[int]  # its first tokens


class RequestState(msgspec.Struct, frozen=True):
    """How far one request is. `edge`: the last edge of the tree that it holds, 0 if none."""

    rid: str
    arrival: int
    phase: Literal["compiling", "waiting", "running"]
    prompt_tokens: int
    computed: int  # tokens whose KV exists
    output_tokens: int
    max_output: int
    cached_tokens: int
    retractions: int
    edge: int
    own_pages: int  # pages that it does not share yet
    awaits_prefix: bool  # another request is computing what it needs


class StepRecord(msgspec.Struct, frozen=True, array_like=True):
    """One step. `ended`: seconds on the clock of `Snapshot.now`."""

    step: int
    ended: float
    seconds: float
    prompt_tokens: int
    decode_tokens: int
    rows: int


class Snapshot(msgspec.Struct, frozen=True, tag="snapshot", kw_only=True):
    """Answer to GetSnapshot: bounded, whatever the engine holds. Not all requests, edges and steps need be
    in it; `num_edges` and the gauges count all."""

    call: str
    now: float
    gauges: dict[str, float]
    counters: dict[str, float]
    num_edges: int
    edges: list[TreeEdge]  # parents before their children
    requests: list[RequestState]
    steps: list[StepRecord]


class Done(msgspec.Struct, frozen=True, tag="done"):
    """Answer to FlushCache, Pause and Resume."""

    call: str
    ok: bool
    message: str = ""


class ProfileDone(msgspec.Struct, frozen=True, tag="profiled"):
    """Answer to StartProfile and StopProfile. `message`: the file of the trace, or why not."""

    call: str
    ok: bool
    message: str


class Heartbeat(msgspec.Struct, frozen=True, tag="beat"):
    """Sent at least every second: `steps` grows while there is work, so health can mean progress (P10)."""

    steps: int
    busy: bool
    paused: bool = False


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Last message of a core that cannot go on (or could not start): why, and what to do."""

    message: str
    code: str


class Outputs(msgspec.Struct, frozen=True, tag="outs"):
    """All outputs of one step in one frame."""

    items: list[TokensOut]


FromCore = Ready | Outputs | Stats | Snapshot | Done | ProfileDone | Heartbeat | Failed | AbortAnywhere

encode = msgspec.msgpack.Encoder().encode
decode_to_core = msgspec.msgpack.Decoder(ToCore).decode
decode_from_core = msgspec.msgpack.Decoder(FromCore).decode
