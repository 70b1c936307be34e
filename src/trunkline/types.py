"""Vocabulary of the whole engine: plain value types, no behaviour, no torch.

Everything here may cross a process boundary, so every type is a frozen `msgspec.Struct`.
Limits are the bounds that admission enforces (promise P1): a value outside them never reaches a worker.
"""

from __future__ import annotations

from typing import Literal

import msgspec

MAX_TOP_LOGPROBS = 20  # alternatives per position; OpenAI's own bound
MAX_N = 128  # completions per prompt
MAX_STOP_STRINGS = 32
MAX_LOGIT_BIAS = 1024

FinishKind = Literal["stop", "length", "abort"]


class FinishReason(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a request ended. `matched` is the stop token id or stop string; abort carries an error."""

    kind: FinishKind
    matched: int | str | None = None
    message: str | None = None
    code: str | None = None  # stable error code, for kind "abort"
    status: int | None = None  # HTTP status, for kind "abort"
    param: str | None = None  # offending field, for a refusal
    pointer: str | None = None  # JSON pointer to the offending part of it


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """How to choose tokens and when to stop. Names and defaults are those of SGLang's `sampling_params`.

    The engine core reads the token-level fields; the text-level fields (`stop`, `stop_regex`,
    `skip_special_tokens`, `spaces_between_special_tokens`, `no_stop_trim`, `n`, `stream_interval`) are served
    by the text layer before and after it.
    """

    max_new_tokens: int | None = 128  # None: up to the context limit
    min_new_tokens: int = 0
    temperature: float = 1.0  # 0 means greedy
    top_p: float = 1.0
    top_k: int = -1  # -1: whole vocabulary
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    sampling_seed: int | None = None  # None: drawn at random by the frontend, and reported
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_regex: tuple[str, ...] = ()
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    stream_interval: int = 1  # tokens that a piece of a stream has at least, but the first


class LogprobParams(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Which log-probabilities to return. Present on a request only when any are asked for.

    `prompt_start`: first prompt position to report (its own entry is None: nothing precedes it), or None for
    outputs only. `top_n` most likely alternatives and the listed `token_ids` are reported at each position.
    """

    prompt_start: int | None = None
    top_n: int = 0
    token_ids: tuple[int, ...] = ()


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position, natural log, of the model's own distribution (before temperature,
    penalties and filters)."""

    token_id: int
    logprob: float | None  # None only at the first reported prompt position
    top: list[tuple[int, float]] = []  # (token id, logprob), most likely first
    chosen: list[tuple[int, float]] = []  # for LogprobParams.token_ids, in their order


GrammarKind = Literal["json_schema", "json_object", "regex", "ebnf", "choices", "structural_tag"]


class GrammarSpec(msgspec.Struct, frozen=True):
    """A constraint as it is asked for; hashable, so that it keys the cache of compiled grammars.

    `source` by kind: json_schema - the schema as JSON text; json_object - "" (any JSON object); regex - the
    pattern, which the whole output matches; ebnf - the grammar's text; choices - a JSON array of strings;
    structural_tag - the tag as JSON text.
    """

    kind: GrammarKind
    source: str = ""
    ordered: bool = False  # json_schema: properties come in the order that the schema lists them


class Thinking(msgspec.Struct, frozen=True, omit_defaults=True):
    """The output begins with reasoning, up to the first `end_ids`; a grammar holds for what follows.

    After `max_tokens` tokens of reasoning, its end is forced.
    """

    end_ids: tuple[int, ...]
    max_tokens: int | None = None


Pooling = Literal["last", "mean"]  # of hidden states: the last token's, or the average over all tokens


class CacheKey(msgspec.Struct, frozen=True):
    """Everything but the tokens that made a KV page (P13). Pages are shared only under an equal key."""

    adapter: str = ""
    salt: str = ""  # tenant or cache_salt / extra_key of the request
    weight_version: str = "default"


class SessionTurn(msgspec.Struct, frozen=True):
    """A request's place in a session. `number` is never used there twice; the first `kept` tokens of its
    prompt are those of turn `follows` (0: of none)."""

    session: str
    number: int
    follows: int = 0
    kept: int = 0


MissReason = Literal[
    "whole_prompt", "page_tail", "prompt_logprobs", "disabled", "empty", "other_tokens", "end_of_branch",
    "evicted", "flushed",
]  # fmt: skip
Explain = Literal["no", "counts", "tokens"]  # whether, and with the tree's own tokens or without


class Elsewhere(msgspec.Struct, frozen=True):
    """A namespace that holds more of a prompt than the request's own: its key, and how many tokens of it."""

    adapter: str
    weight_version: str
    salted: bool
    matched: int


class PrefixMiss(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Where a prompt left the prefix cache when it was admitted, and what was there.

    `matched`: tokens reused, whole pages. `position`: first token that differs from what is cached; behind
    `matched` when it is inside of a page. `wanted`: the prompt's tokens from there on. `found`: the tokens
    that the nearest branch has instead, if they may be shown. `branches`: continuations cached there.
    `missed`: prompt tokens that had to be computed though whole pages of them could have been cached.
    """

    reason: MissReason
    prompt_tokens: int
    matched: int
    position: int
    page_size: int
    missed: int
    branches: int = 0
    wanted: tuple[int, ...] = ()
    found: tuple[int, ...] = ()
    elsewhere: tuple[Elsewhere, ...] = ()


class Timing(msgspec.Struct, frozen=True, array_like=True):
    """When things happened to a request in the core: seconds on the machine's monotonic clock.

    `chunks`: the steps that computed its prompt as (start, end, tokens), for requests that are traced.
    """

    arrived: float
    ready: float  # its grammar was compiled; `arrived` if it has none
    admitted: float  # first time that it got a row
    first_token: float
    chunks: list[tuple[float, float, int]] = []


class RequestError(Exception):
    """A request that cannot be honoured; carries what the client is told (P2, P17).

    `code` is stable, `param` names the offending field, `status` is the HTTP status. `retry_after`: seconds
    after which it may be honoured.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        param: str | None = None,
        status: int = 400,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param
        self.status = status
        self.retry_after = retry_after
