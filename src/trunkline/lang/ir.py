"""What a program is made of: expressions that a state appends, and the sampling parameters they carry."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from trunkline.lang.choices import (
    ChoicesDecision,
    ChoicesSamplingMethod,
    TokenLists,
    mean_logprob,
    token_length_normalized,
)
from trunkline.types import RequestError

# What `dtype` means, as regular expressions; int and float also end at a blank or a new line.
DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "int": r"[-+]?[0-9]+[ \n]*",
        "float": r"[-+]?[0-9]*\.?[0-9]+[ \n]*",
        "bool": r"(True|False)",
        "str": r"\"[\w\d\s]*\"",
        "string": r"\"[\w\d\s]*\"",
    }
)


@dataclass(kw_only=True)
class Sampling:
    """Sampling parameters of one call. In a `gen`, None means: as the run says."""

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    n: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    stop_regex: str | Sequence[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    ignore_eos: bool | None = None
    return_logprob: bool | None = None
    logprob_start_len: int | None = None
    top_logprobs_num: int | None = None
    return_text_in_logprobs: bool | None = None
    dtype: type | str | None = None
    regex: str | None = None
    json_schema: str | None = None

    def given(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def asked(self) -> dict[str, Any]:
        """What is given and differs from RUN_DEFAULTS."""
        return {name: one for name, one in self.given().items() if one != getattr(RUN_DEFAULTS, name)}

    def over(self, other: Sampling) -> Sampling:
        """A copy of `other` in which what is given here wins."""
        return replace(other, **self.given())

    @property
    def schema(self) -> Any:
        """What json_schema says. Raises RequestError where it is no JSON."""
        try:
            return json.loads(self.json_schema or "")
        except ValueError as error:
            raise RequestError(
                f"json_schema is no JSON: {error}", code="invalid_value", param="json_schema"
            ) from error

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


# What a run takes where the program says nothing.
RUN_DEFAULTS = Sampling(
    max_new_tokens=128,
    n=1,
    temperature=1.0,
    top_p=1.0,
    top_k=-1,
    min_p=0.0,
    frequency_penalty=0.0,
    presence_penalty=0.0,
    ignore_eos=False,
)


def run_sampling(values: dict[str, Any]) -> Sampling:
    """RUN_DEFAULTS with the given ones."""
    return Sampling(**values).over(RUN_DEFAULTS)


class Expr:
    """Anything that can be added to a state. `a + b` is one after the other."""

    def parts(self) -> Iterator[Expr]:
        """The single expressions in order."""
        yield self

    def __add__(self, other: Any) -> Expr:
        return Sequential((self, as_expr(other)))

    def __radd__(self, other: Any) -> Expr:
        return Sequential((as_expr(other), self))


@dataclass(frozen=True)
class Sequential(Expr):
    """Several expressions, one after the other."""

    items: tuple[Expr, ...]

    def parts(self) -> Iterator[Expr]:
        for item in self.items:
            yield from item.parts()


@dataclass(frozen=True)
class Fill(Expr):
    """Constant text."""

    text: str


@dataclass(frozen=True)
class Gen(Expr):
    """Text from the model, kept as variable `name` if that is given."""

    name: str | None
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Select(Expr):
    """The best of `choices` by `method`."""

    name: str | None
    choices: Sequence[str]
    method: ChoicesSamplingMethod = token_length_normalized

    def decide(
        self, inputs: TokenLists, outputs: TokenLists | None = None, alone: TokenLists | None = None
    ) -> ChoicesDecision:
        """By the tokens of each choice after the prompt, what is generated after it, and the same tokens
        without the prompt."""
        return self.method(
            choices=self.choices,
            normalized_prompt_logprobs=[mean_logprob(tokens) for tokens in inputs],
            input_token_logprobs=inputs,
            output_token_logprobs=[[] for _ in inputs] if outputs is None else outputs,
            unconditional_token_logprobs=alone,
        )


@dataclass(frozen=True)
class Image(Expr):
    """An image: a file's path, or the bytes of a file."""

    source: str | bytes


@dataclass(frozen=True)
class Video(Expr):
    """`num_frames` frames of a video file."""

    path: str
    num_frames: int


@dataclass(frozen=True)
class RoleBegin(Expr):
    role: str


@dataclass(frozen=True)
class RoleEnd(Expr):
    role: str


@dataclass(frozen=True)
class ScopeBegin(Expr):
    """From here to the end of the scope, text is kept as variable `name`."""

    name: str


@dataclass(frozen=True)
class ScopeEnd(Expr):
    name: str


@dataclass(frozen=True)
class SetVariable(Expr):
    name: str
    value: Any


@dataclass(frozen=True)
class SplitReasoning(Expr):
    """What `name` holds is cut into reasoning and answer, by the tags of `model_type`."""

    name: str
    model_type: str


def as_expr(value: Any) -> Expr:
    """Text becomes Fill. Raises TypeError for what can't be added to a state."""
    if isinstance(value, Expr):
        return value
    if isinstance(value, str):
        return Fill(value)
    raise TypeError(f"a program's state takes text and expressions such as gen(), not {value!r}")


def reasoning_name(name: str) -> str:
    return f"{name}_reasoning_content"


def turn(role: str, expr: Any = None) -> Expr:
    """A whole turn."""
    inner = () if expr is None else (as_expr(expr),)
    return Sequential((RoleBegin(role), *inner, RoleEnd(role)))
