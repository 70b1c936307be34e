"""A request as the scheduler sees it: tokens, and counters of what was promised and what came back."""

from __future__ import annotations

from dataclasses import dataclass, field

from trunkline.cache import Lease
from trunkline.messages import AddRequest
from trunkline.scheduler.guide import Guide
from trunkline.scheduler.timeline import Timeline
from trunkline.types import PrefixMiss, TokenLogprobs


@dataclass(eq=False, slots=True)
class Request:
    """Counters of the scheduling rule (docs/architecture.md).

    `tokens`: known tokens. `pending`: most tokens that steps in flight can still add. `computed`: KV length
    after all steps in flight, at most. `settled`: KV length after all retired steps, exactly. `drafts`: how
    many drafts exist for the next step.
    """

    message: AddRequest
    arrival: int  # order of arrival; a preempted request keeps its place
    max_tokens: int  # prompt and output together
    stops: frozenset[int]  # tokens that end it
    received: int  # tokens whose KV comes from another instance
    claims: list[int]  # fingerprints of its prompt's blocks, see scheduler.claims
    timeline: Timeline
    prompt_len: int = field(init=False)
    tokens: list[int] = field(init=False)
    pending: int = 0
    computed: int = 0
    settled: int = 0
    drafts: int = 0
    epoch: int = 0  # grows whenever a row is given up; results of older epochs are dropped
    row: int = -1  # -1: not running
    lease: Lease | None = None
    bypassed: int = 0  # later arrivals admitted before it
    awaits: int | None = None  # claimed block of its prompt that it waits for, while waiting
    cached_tokens: int | None = None  # prefix hit of the first admission
    retractions: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    urgency: int = 0  # higher goes first; its priority, or that negated
    guide: Guide | None = None  # what may come next, for a constrained output
    sent: int = 0  # output tokens handed out
    forced: list[int] = field(default_factory=list)  # positions of tokens not yet sent that were dictated
    prefix_miss: PrefixMiss | None = None  # where its prompt left the cache, if that was asked
    withdrawn: bool = False  # the token that a step in flight will sample is known already

    def __post_init__(self) -> None:
        self.tokens = list(self.message.token_ids)
        self.prompt_len = len(self.tokens)

    @property
    def rid(self) -> str:
        return self.message.rid

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def base(self) -> int:
        """Tokens to run before the next one can be sampled."""
        return len(self.tokens) + self.pending - self.computed

    @property
    def remaining(self) -> int:
        """Output tokens that nothing has promised yet."""
        return self.max_tokens - len(self.tokens) - self.pending

    @property
    def next_prompt_logprob(self) -> int | None:
        """First prompt position whose log-probability is still to be reported, or None."""
        spec = self.message.logprobs
        if spec is None or spec.prompt_start is None:
            return None
        position = spec.prompt_start + 1 + len(self.prompt_logprobs)
        return position if position < self.prompt_len else None

    @property
    def prefix_limit(self) -> int:
        """Most tokens that a prefix hit may cover: positions whose logits or hidden states are needed are
        computed."""
        limit = 0 if self.message.pooling == "mean" else len(self.tokens) - 1
        wanted = self.next_prompt_logprob
        return limit if wanted is None else min(limit, wanted - 1)
