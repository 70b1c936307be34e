"""Follows a program without running it: what it appends, in order, up to the first value that it needs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from trunkline.lang.backends.backend import Backend
from trunkline.lang.chat_template import ChatTemplate
from trunkline.lang.ir import Expr, Fill, RoleBegin, RoleEnd, ScopeBegin, ScopeEnd, SetVariable
from trunkline.lang.transcript import Transcript


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


class Branches(Expr):
    """The program forks; what each branch appends."""

    def __init__(self, tracers: Sequence[Tracer]) -> None:
        self.tracers = tracers


class Tracer:
    """Takes the place of an executor below a state. `nodes`: single expressions, in order."""

    error = None

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.nodes: list[Expr] = []

    def submit(self, expr: Expr) -> None:
        for part in expr.parts():
            self.nodes += split_marks(part.text) if isinstance(part, Fill) else [part]

    def fork(self, count: int) -> list[Tracer]:
        tracers = [Tracer(self.backend) for _ in range(count)]
        self.nodes.append(Branches(tracers))
        return tracers

    def join(self, children: Sequence[Tracer], mode: str) -> None:
        """What the branches have said stays with them."""

    def read(self, name: str) -> Any:
        return Variable(name)

    def sync(self, name: str | None = None) -> None:
        raise ValueUnknown("text and meta data are not known while tracing")

    # ------------------------------------------------------------------ what the trace tells
    def flatten(self) -> Iterator[Expr]:
        """All nodes, those of branches after the fork."""
        for node in self.nodes:
            yield node
            if isinstance(node, Branches):
                for tracer in node.tracers:
                    yield from tracer.flatten()

    def prefix(self, template: ChatTemplate) -> str:
        """The constant text with which every run begins."""
        said = Transcript(template)
        with contextlib.suppress(ValueError):  # roles that don't fit: a run will say so
            for node in self.nodes:
                match node:
                    case Fill(text):
                        said.text += text
                    case RoleBegin(role):
                        said.role_begin(role)
                    case RoleEnd(role):
                        said.role_end(role)
                    case ScopeBegin() | ScopeEnd() | SetVariable():
                        continue
                    case _:
                        break
        return said.text

    def arguments(self) -> list[str]:
        """Names of the arguments in the order of their first use."""
        found = dict.fromkeys(node.name for node in self.flatten() if isinstance(node, Argument))
        return list(found)
