"""The contract between scheduler and worker: what to run, and what came out. Plain host data, serialisable.

Nothing else is shared by the two. A worker applies a plan in this order: `retires`, `admits`, `new_pages`,
`appends`, then one forward pass over `rows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from trunkline.types import LogprobParams, Pooling, SamplingParams, TokenLogprobs


class Admit(msgspec.Struct, frozen=True, kw_only=True):
    """Give `row` to a request. All per-row state of the worker is reset to this.

    `token_ids` are all known tokens (the prompt, and outputs so far if the request was preempted before);
    KV of the first `computed` exists in `pages`.
    """

    row: int
    rid: str
    token_ids: list[int]
    prompt_len: int
    computed: int
    pages: list[int]
    params: SamplingParams
    logprobs: LogprobParams | None
    prompt_logprobs_from: (
        int | None
    )  # position p >= 1: the first one to report in this run; None when not wanted
    guided: bool = False  # masks come with the steps that sample it
    received: int = 0  # tokens whose KV another instance delivers into `pages`, instead of this one's cache
    pooling: Pooling | None = None  # the step that would sample yields a vector too


class PagesAt(msgspec.Struct, frozen=True, array_like=True):
    """Entries `[start, start + len(pages))` of the row's page table become `pages` (grown, or swapped for the
    tree's identical copy)."""

    row: int
    start: int
    pages: list[int]


class TokensAt(msgspec.Struct, frozen=True, array_like=True):
    """The row's tokens from position `start` on are `token_ids`, and nothing follows them: what the row
    sampled there itself does not count."""

    row: int
    start: int
    token_ids: list[int]


class RowStep(msgspec.Struct, frozen=True, array_like=True):
    """One row's share of a step: run `q_len` tokens, the last `num_drafts` of which are drafts.

    `samples` is false for a prompt chunk that is not the last. A sampling row yields between 1 and
    `1 + num_drafts` tokens.
    """

    row: int
    q_len: int
    num_drafts: int
    samples: bool


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One step. `rows` may be empty: nothing to compute, but retires still apply."""

    step: int
    retires: list[int] = []  # rows whose request left
    admits: list[Admit] = []
    new_pages: list[PagesAt] = []
    appends: list[TokensAt] = []  # tokens that nothing has to choose: known grew by them
    rows: list[RowStep] = []
    needs_prev_tokens: bool = False  # a row's mask depends on the step before: retire that before sampling

    @property
    def num_tokens(self) -> int:
        return sum(row.q_len for row in self.rows)

    @property
    def is_empty(self) -> bool:
        """Whether it changes nothing for a worker."""
        return not (self.rows or self.retires or self.admits or self.new_pages or self.appends)


@dataclass(frozen=True)
class Masks:
    """What some of a step's sampling rows may choose. `at`: their places among the sampling rows, rising;
    `words`: int32 [len(at), ceil(vocabulary / 32) or more], bit (t & 31) of word t >> 5 is 1 where token t
    is allowed. At least one token of each is."""

    at: Sequence[int]
    words: npt.NDArray[np.int32]


class RowOutput(msgspec.Struct, frozen=True, array_like=True):
    """What a row produced: accepted drafts + 1 sampled token if it samples, else nothing.

    `prompt_logprobs` holds entries for the prompt positions that this step could report, in order.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    embedding: bytes = b""  # of a pooled row that samples: float32 [hidden], little-endian
    error: str | None = None  # this row alone failed (e.g. non-finite logits); its request ends


class StepOutput(msgspec.Struct, frozen=True):
    """One `RowOutput` per `StepPlan.rows` entry, in the same order."""

    rows: list[RowOutput]
