"""How `select` decides: each method scores every choice from the log-probabilities of its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Protocol

TokenEntry = Sequence[Any]  # [logprob or None, token id, text or None]
TokenLists = Sequence[Sequence[TokenEntry]]  # one list per choice


@dataclass(frozen=True)
class ChoicesDecision:
    """The choice, and what it rests on."""

    decision: str
    meta_info: Mapping[str, Any] = field(default_factory=dict)


class ChoicesSamplingMethod(Protocol):
    """A rule that picks one of `choices`.

    `input_token_logprobs` holds the tokens of each choice after the prompt, `normalized_prompt_logprobs`
    their means. `unconditional_token_logprobs`, the same tokens without the prompt, is given only if
    `requires_unconditional_logprobs`."""

    @property
    def requires_unconditional_logprobs(self) -> bool: ...

    def __call__(
        self,
        *,
        choices: Sequence[str],
        normalized_prompt_logprobs: Sequence[float],
        input_token_logprobs: TokenLists,
        output_token_logprobs: TokenLists,
        unconditional_token_logprobs: TokenLists | None = None,
    ) -> ChoicesDecision: ...


def mean_logprob(tokens: Sequence[TokenEntry]) -> float:
    """Mean over the tokens whose log-probability is known; 0 without any."""
    known = [token[0] for token in tokens if token[0] is not None]
    return fmean(known) if known else 0.0


def _argmax(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


class TokenLengthNormalized:
    """The choice with the highest mean log-probability of its tokens."""

    requires_unconditional_logprobs = False

    def __call__(
        self, *, choices: Sequence[str], normalized_prompt_logprobs: Sequence[float], **evidence: Any
    ) -> ChoicesDecision:
        meta = {"normalized_prompt_logprobs": normalized_prompt_logprobs, **evidence}
        return ChoicesDecision(choices[_argmax(normalized_prompt_logprobs)], meta)


class GreedyTokenSelection:
    """Token by token, the choices that are not the likeliest there drop out.

    A choice that has ended goes on with the mean of its own log-probabilities.
    """

    requires_unconditional_logprobs = False

    def __call__(
        self, *, choices: Sequence[str], input_token_logprobs: TokenLists, **evidence: Any
    ) -> ChoicesDecision:
        longest = max(map(len, input_token_logprobs))
        matrix = []
        for tokens in input_token_logprobs:
            mean = mean_logprob(tokens)
            row = [mean if token[0] is None else float(token[0]) for token in tokens]
            matrix.append(row + [mean] * (longest - len(row)))
        left = list(range(len(choices)))
        for column in range(longest):
            top = max(matrix[i][column] for i in left)
            left = [i for i in left if matrix[i][column] == top]
        meta = {"input_token_logprobs": input_token_logprobs, "greedy_logprob_matrix": matrix, **evidence}
        return ChoicesDecision(choices[left[0]], meta)


class UnconditionalLikelihoodNormalized:
    """The choice that the prompt makes likelier than it is on its own, by the mean over its tokens
    (Brown et al. 2020, arXiv:2005.14165, section 2.4). A first token alone, which nothing precedes, counts
    0."""

    requires_unconditional_logprobs = True

    def __call__(
        self,
        *,
        choices: Sequence[str],
        input_token_logprobs: TokenLists,
        unconditional_token_logprobs: TokenLists | None = None,
        **evidence: Any,
    ) -> ChoicesDecision:
        if unconditional_token_logprobs is None:
            raise ValueError("unconditional likelihood normalization needs unconditional_token_logprobs")
        scores = [
            fmean((here[0] or 0.0) - (alone[0] or 0.0) for here, alone in zip(given, bare, strict=True))
            for given, bare in zip(input_token_logprobs, unconditional_token_logprobs, strict=True)
        ]
        meta = {
            "input_token_logprobs": input_token_logprobs,
            "unconditional_token_logprobs": unconditional_token_logprobs,
            "normalized_unconditional_prompt_logprobs": scores,
            **evidence,
        }
        return ChoicesDecision(choices[_argmax(scores)], meta)


token_length_normalized = TokenLengthNormalized()
greedy_token_selection = GreedyTokenSelection()
unconditional_likelihood_normalized = UnconditionalLikelihoodNormalized()
