"""A language model of integers in which any stale, misplaced or unwritten KV slot changes the output.

The KV slot of position p is a hash of (what p - 1 attended to, token, p). What position p attends to is the
sum of all slots in [0, p], so every slot counts, not only the last. Logits are a hash of that sum.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.sim.grammar import choices
from tests.sim.integers import EOS_IDS as EOS_IDS
from tests.sim.integers import NUM_SAMPLED as NUM_SAMPLED
from tests.sim.integers import VOCAB_SIZE as VOCAB_SIZE
from tests.sim.integers import mix as mix
from trunkline.messages import AddRequest
from trunkline.types import CacheKey, FinishReason, LogprobParams, Pooling, SamplingParams, TokenLogprobs


def start_state(key: CacheKey) -> int:
    """What the position before the first attends to: KV differs under every cache key, as with adapters."""
    state = 7
    for char in f"{key.adapter}/{key.salt}/{key.weight_version}":
        state = mix(state + ord(char))
    return state


def slot_of(attended: int, token: int, position: int) -> int:
    return mix(attended + token * 0x9E3779B97F4A7C15 + position * 0xC2B2AE3D27D4EB4F)


@dataclass(slots=True)
class Chooser:
    """Sampling parameters as a function of (logits, number of tokens put out before): counter-based."""

    seed: int
    penalty: int
    min_new: int
    banned: frozenset[int]

    @classmethod
    def of(cls, params: SamplingParams) -> Chooser:
        return cls(
            seed=mix(params.sampling_seed or 0),
            penalty=int(params.presence_penalty * 8),
            min_new=params.min_new_tokens,
            banned=frozenset(EOS_IDS + params.stop_token_ids),
        )

    def __call__(self, attended: int, num_out: int, choices: frozenset[int] | None = None) -> int:
        """The token after a position, one of `choices` if there are any. `penalty` stands for penalties: it
        depends on the outputs so far."""
        token = mix(attended ^ self.seed ^ (self.penalty * num_out)) % NUM_SAMPLED
        if choices is not None:
            while token not in choices:
                token = (token + 1) % NUM_SAMPLED
        elif num_out < self.min_new:
            while token in self.banned:
                token = (token + 1) % NUM_SAMPLED
        return token


def logprob_of(attended: int, token: int) -> float:
    return -((attended ^ (token * 0x9E3779B1)) % 4096) / 256


def token_logprobs(attended: int, token: int, wanted: LogprobParams) -> TokenLogprobs:
    top = [(i, logprob_of(attended, i)) for i in range(wanted.top_n)]
    chosen = [(i, logprob_of(attended, i)) for i in wanted.token_ids]
    return TokenLogprobs(token, logprob_of(attended, token), top, chosen)


def pooled(states: list[int], pooling: Pooling) -> bytes:
    """The vector of a text whose positions attended to `states`; the mean depends on how many there were."""
    value = states[-1] if pooling == "last" else mix(sum(states) + len(states))
    return value.to_bytes(16, "little")


@dataclass(slots=True)
class Expected:
    """What naive generation gives, one token at a time, with no cache and no batch."""

    token_ids: list[int]
    finish: FinishReason
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[TokenLogprobs] | None
    embedding: bytes = b""


def generate(message: AddRequest, max_context: int) -> Expected:
    """Naive generation: the reference for every finished request."""
    params, wanted = message.params, message.logprobs
    choose = Chooser.of(params)
    attended, token = start_state(message.cache_key), -1
    prompt_logprobs: list[TokenLogprobs] = []
    states: list[int] = []
    first = wanted.prompt_start if wanted is not None else None
    for position, token in enumerate(message.token_ids):
        if wanted is not None and first is not None and position >= first:
            report = token_logprobs(attended, token, wanted)
            prompt_logprobs.append(TokenLogprobs(token, None) if position == first else report)
        attended += slot_of(attended, token, position)
        states.append(attended)
    if message.pooling is not None:
        return Expected([], FinishReason("length"), None, None, pooled(states, message.pooling))
    room = max_context - len(message.token_ids)
    limit = room if params.max_new_tokens is None else min(room, params.max_new_tokens)
    ends = () if params.ignore_eos and message.grammar is None else EOS_IDS
    stops = frozenset(ends + params.stop_token_ids)
    out: list[int] = []
    logprobs: list[TokenLogprobs] = []
    finish = FinishReason("length")
    while len(out) < limit:
        token = choose(attended, len(out), choices(message, out))
        if wanted is not None:
            logprobs.append(token_logprobs(attended, token, wanted))
        out.append(token)
        if token in stops:
            finish = FinishReason("stop", matched=token)
            break
        attended += slot_of(attended, token, len(message.token_ids) + len(out) - 1)
    return Expected(out, finish, logprobs if wanted else None, prompt_logprobs if first is not None else None)


def draft(attended: int, tokens: list[int], choose: Chooser, num_out: int, count: int) -> list[int]:
    """`count` guesses for what follows `tokens`, whose last has no KV yet. Right two times in three."""
    guesses: list[int] = []
    token, position = tokens[-1], len(tokens) - 1
    for i in range(count):
        attended += slot_of(attended, token, position + i)
        token = choose(attended, num_out + i)
        if mix(attended + 99) % 3 == 0:
            token = (token + 1) % VOCAB_SIZE
        guesses.append(token)
    return guesses
