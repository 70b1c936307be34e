"""What a program is made of: expressions that a state appends, and the sampling parameters they carry."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from trunkline.lang.choices import ChoicesMethod, token_length_normalized

# What `dtype` means, as regular expressions; int and float also end at a blank or a new line.
REGEX_INT = r"[-+]?[0-9]+[ \n]*"
REGEX_FLOAT = r"[-+]?[0-9]*\.?[0-9]+[ \n]*"
REGEX_BOOL = r"(True|False)"
REGEX_STR = r"\"[\w\d\s]*\""


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

    def over(self, other: Sampling) -> Sampling:
        """A copy of `other` in which what is given here wins."""
        given = {one.name: getattr(self, one.name) for one in fields(self)}
        return replace(other, **{name: value for name, value in given.items() if value is not None})

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
    return Sampling(**values).over(copy.copy(RUN_DEFAULTS))


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
    temperature: float = 0.0
    method: ChoicesMethod = token_length_normalized


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


class Unknown(Expr):
    """A value that only a run has, while a program is traced. Asking for it raises ValueUnknown.

    It may be appended; in an f-string it leaves a mark that `split_marks` finds again.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name})"

    def __str__(self) -> str:
        return f"\0{self.name}\0"

    def __format__(self, spec: str) -> str:
        return str(self)

    def _unknown(self, *_: Any) -> Any:
        raise ValueUnknown(f"the value of {self.name!r} is not known while tracing")

    __bool__ = __len__ = __iter__ = __getitem__ = __int__ = __float__ = __index__ = _unknown
    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__ = __ne__ = __getattr__ = _unknown
    __hash__ = Expr.__hash__


class Argument(Unknown):
    """An argument of the program."""


class Variable(Unknown):
    """A variable that the program reads."""


class ValueUnknown(Exception):
    """A traced program asked for a value that only a run has."""


_MARK = re.compile("\0([^\0]*)\0")


def split_marks(text: str) -> Iterator[Expr]:
    """Constant text and the arguments that stand in it, in order."""
    for i, piece in enumerate(_MARK.split(text)):
        if i % 2:
            yield Argument(piece)
        elif piece:
            yield Fill(piece)


def as_expr(value: Any) -> Expr:
    """Text becomes Fill. Raises TypeError for what can't be added to a state."""
    if isinstance(value, Expr):
        return value
    if isinstance(value, str):
        return Fill(value)
    raise TypeError(f"a program's state takes text and expressions such as gen(), not {value!r}")


def variables_of(expr: Expr) -> tuple[str, ...]:
    """The variables that executing `expr` sets."""
    if isinstance(expr, SplitReasoning):
        return expr.name, reasoning_name(expr.name)
    named = isinstance(expr, Gen | Select | SetVariable | ScopeEnd) and expr.name is not None
    return (expr.name,) if named else ()  # type: ignore[attr-defined]


def reasoning_name(name: str) -> str:
    return f"{name}_reasoning_content"
