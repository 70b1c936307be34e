"""Follows a program without running it: what it appends, in order, up to the first value that it needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from trunkline.lang.backends.backend import Backend
from trunkline.lang.chat_template import ChatTemplate
from trunkline.lang.ir import (
    Argument,
    Expr,
    Fill,
    RoleBegin,
    RoleEnd,
    ScopeBegin,
    ScopeEnd,
    SetVariable,
    ValueUnknown,
    Variable,
    split_marks,
)
from trunkline.lang.transcript import Transcript


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

    def end(self) -> None:
        """Nothing to end."""

    def read(self, name: str) -> Any:
        return Variable(name)

    def wait_for(self, name: str) -> None:
        raise ValueUnknown(f"meta data of {name!r} is not known while tracing")

    def sync(self) -> None:
        raise ValueUnknown("the text is not known while tracing")

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
                        said.fill(text)
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
