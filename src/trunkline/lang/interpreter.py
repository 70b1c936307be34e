"""Runs the expressions of one state, in order, as a coroutine on the programs' event loop.

Appending never waits: it queues the expression. Only reading a value does. A state without work has no task
and no thread, so that thousands of them cost nothing but their text."""

from __future__ import annotations

import asyncio
import contextlib
import linecache
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal

from trunkline.lang.backends.backend import Backend, Prompt, TokenPath
from trunkline.lang.global_config import global_config
from trunkline.lang.ir import (
    Expr,
    Fill,
    Gen,
    Image,
    RoleBegin,
    RoleEnd,
    Sampling,
    ScopeBegin,
    ScopeEnd,
    Select,
    SetVariable,
    SplitReasoning,
    Video,
    reasoning_name,
    variables_of,
)
from trunkline.lang.speculation import Speculation, complete_turn
from trunkline.lang.transcript import Transcript
from trunkline.text.reasoning import split_reasoning

JoinMode = Literal["gather_variable", "concate_and_append"]


@dataclass(frozen=True)
class Fork(Expr):
    """The children go on from here."""

    children: Sequence[StreamExecutor]


@dataclass(frozen=True)
class Join(Expr):
    """Waits for `children`, each up to its expression number `upto`, and takes over their variables or
    text."""

    children: Sequence[StreamExecutor]
    upto: Sequence[int]
    mode: JoinMode


class ProgramCancelled(Exception):
    """The program was given up before it ended."""


Origin = tuple[str, int]  # file and line of the program


def program_line() -> Origin:
    """Where the program's own code is, below the frames of this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if not module.startswith("trunkline.lang") and module != "contextlib":
            break
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


class StreamExecutor:
    """One state. Expressions are numbered from 1 in the order of `submit`; `_done` counts finished ones.

    Shared between the caller's threads and the event loop: the queue and the counters, under `_changed`. The
    transcript and the variables are written by the loop only.
    """

    def __init__(
        self,
        backend: Backend,
        sampling: Sampling,
        *,
        name: str = "program",
        stream: bool = False,
        num_api_spec_tokens: int | None = None,
        eager: bool = False,
    ) -> None:
        self.backend = backend
        self.sampling = sampling
        self.name = name
        self.streaming = stream
        self.program: threading.Thread | None = None  # that runs the function beside those who read
        self.eager = eager  # submit waits: nothing runs beside the caller
        self.transcript = Transcript(backend.get_chat_template())
        self.variables: dict[str, Any] = {}
        self.meta_info: dict[str, dict[str, Any]] = {}
        self.error: Exception | None = None
        self._spec = None if num_api_spec_tokens is None else Speculation(num_api_spec_tokens)
        self._turn: list[Expr] | None = None  # speculation on a chat model: what the open turn consists of
        self._path = TokenPath()
        self._committed = 0  # characters known to be in the prefix cache
        self._forked_at = 0  # where a child's own text begins
        self._changed = threading.Condition()
        self._queue: deque[tuple[Expr, Origin]] = deque()
        self._submitted = self._done = 0
        self._writes: dict[str, int] = {}  # variable -> number of the expression that last sets it
        self._active = False  # a task works, or will when the parent gets to the fork
        self._ended = False
        self._task: asyncio.Task[None] | None = None
        self._listeners: list[Callable[[], None]] = []  # called after every change
        self._at_end: list[Callable[[], None]] = []  # called once

    # ------------------------------------------------------------------ from the program's thread
    def submit(self, expr: Expr) -> None:
        """Queue an expression; after a failure, drop it."""
        origin = program_line()
        for part in expr.parts():
            with self._changed:
                self._submitted += 1
                failed = self.error
                if failed is None:
                    self._writes |= dict.fromkeys(variables_of(part), self._submitted)
                    self._queue.append((part, origin))
                    if not self._active:
                        self._active = True
                        global_config.loop().call_soon_threadsafe(self._start)
            if failed is not None and isinstance(part, Fork):
                for child in part.children:
                    child.fail(failed)
        if self.eager:
            self.sync()

    def fork(self, count: int) -> list[StreamExecutor]:
        """Children that go on from what this state has said when it gets here. Does not wait."""
        children = [self._child() for _ in range(count)]
        self.submit(Fork(children))
        return children

    def _child(self) -> StreamExecutor:
        spec = None if self._spec is None else self._spec.num_tokens
        child = StreamExecutor(
            self.backend,
            self.sampling,
            name=self.name,
            stream=self.streaming,
            num_api_spec_tokens=spec,
            eager=self.eager,
        )
        child._active, child._done = True, -1  # until the fork; what it inherits is there at number 0
        child._writes = dict.fromkeys(self._writes, 0)
        return child

    def join(self, children: Sequence[StreamExecutor], mode: JoinMode) -> None:
        """Take over what `children` have been told to do up to now. Does not wait."""
        self.submit(Join(children, [child._submitted for child in children], mode))
        for child in children:
            child.end()

    def end(self) -> None:
        """The program has said all it will say."""
        with self._changed:
            self._ended = True
        self._tell()

    def cancel(self) -> None:
        """Give up what has not been done yet, and abort the call that is under way."""

        def give_up() -> None:
            if self._task is not None:
                self._task.cancel()
            elif not self.finished:
                self.fail(ProgramCancelled(f"program {self.name!r} was cancelled"))

        global_config.loop().call_soon_threadsafe(give_up)

    # ------------------------------------------------------------------ waiting and reading
    @property
    def finished(self) -> bool:
        """Nothing will change any more."""
        return self.error is not None or (self._ended and self._done == self._submitted)

    def _horizon(self) -> Callable[[], bool]:
        """Whether what a reader waits for is done: what has been submitted; beside a program that runs in a
        thread of its own, all that it will submit."""
        if self.program not in (None, threading.current_thread()):
            return lambda: self.finished
        upto = self._submitted
        return lambda: self._done >= upto

    def sync(self) -> None:
        """Wait until everything submitted is done. Raises the error that ended the state."""
        self.wait_until(self._horizon())
        if self.error is not None:
            raise self.error

    @property
    def idle(self) -> bool:
        """Everything submitted so far is done."""
        return self._done == self._submitted

    def knows(self, name: str) -> bool:
        """Whether an expression that sets `name` has been submitted."""
        return name in self._writes or name in self.variables

    def settled(self, name: str) -> bool:
        """Whether the last expression that sets `name` is done."""
        upto = self._writes.get(name, self._submitted)
        return self.error is not None or (self._done >= upto and not self._is_deferred(name))

    def read(self, name: str) -> Any:
        """The value of `name`, when it is settled. Raises the error that ended the state before, or
        KeyError."""
        self.wait_for(name)
        return self.variables[name]

    def wait_for(self, name: str) -> None:
        """Wait until `name` is settled; raises as `read` does."""
        over = self._horizon()
        self.wait_until(lambda: (self.knows(name) and self.settled(name)) or over())
        missing = name not in self.variables
        if self.error is not None and (missing or self._done < self._writes.get(name, self._submitted)):
            raise self.error
        if self._is_deferred(name):
            raise KeyError(f"{name!r} is known at the end of the assistant's turn: read it after that")
        if missing:
            raise KeyError(f"the program sets no variable {name!r}; it has {', '.join(self.variables)}")

    def _is_deferred(self, name: str) -> bool:
        return any(isinstance(part, Gen) and part.name == name for part in self._turn or ())

    def wait_until(self, ready: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.error is not None or ready())

    async def until(self, ready: Callable[[], bool]) -> None:
        """Wait in any event loop until `ready()`, which is asked after every change, or an error."""
        loop, event = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the waiter's loop has been closed
                loop.call_soon_threadsafe(event.set)

        self._listeners.append(wake)
        try:
            while not (self.error is not None or ready()):
                await event.wait()
                event.clear()
        finally:
            self._listeners.remove(wake)

    def when_finished(self, call: Callable[[], None]) -> None:
        """Call once, from any thread, when nothing will change any more."""
        with self._changed:
            self._at_end.append(call)
        self._tell()

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()
            at_end, self._at_end = (self._at_end, []) if self.finished else ([], self._at_end)
        for listener in [*self._listeners, *at_end]:
            listener()

    # ------------------------------------------------------------------ on the event loop
    def _start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        while True:
            with self._changed:
                if not self._queue or self.error is not None:
                    self._active, self._task = False, None
                    break
                expr, origin = self._queue.popleft()
            try:
                await self._execute(expr)
            except Exception as error:
                self.fail(error, origin, expr)
                return
            except asyncio.CancelledError:
                self.fail(ProgramCancelled(f"program {self.name!r} was cancelled"), origin, expr)
                return
            with self._changed:
                self._done += 1
            self._tell()
        self._tell()

    def fail(self, error: Exception, origin: Origin | None = None, during: Expr | None = None) -> None:
        """End the state, and the children that still wait for it, with an error."""
        if origin is not None and not getattr(error, "__notes__", None):
            file, line = origin
            source = linecache.getline(file, line).strip()
            error.add_note(f'in program "{self.name}", {file}, line {line}: {source}')
        with self._changed:
            self.error = self.error or error
            left = [during, *(expr for expr, _ in self._queue)]
            self._queue.clear()
            task, self._active, self._task = self._task, False, None
        if task is not None and during is None:  # from outside: the call that is under way ends too
            global_config.loop().call_soon_threadsafe(task.cancel)
        for expr in left:
            for child in expr.children if isinstance(expr, Fork) else ():
                child.fail(error)
        self._tell()

    async def _execute(self, expr: Expr) -> None:
        match expr:
            case Fill(text):
                self._fill(text)
            case Gen():
                await self._generate(expr)
            case Select(name):
                decision = await self.backend.select(self._prompt(), expr)
                self._fill(decision.decision)
                self._set(name, decision.decision, dict(decision.meta_info))
            case RoleBegin(role):
                self.transcript.role_begin(role)
                if role == "assistant" and self._spec is not None and self.backend.is_chat_model:
                    self._turn = []
            case RoleEnd(role):
                if self._turn is not None:
                    await self._generate_turn(self._turn)
                self.transcript.role_end(role)
            case Fork(children):
                await self._fork(children)
            case Join():
                await self._join(expr)
            case _:
                self._note(expr)

    def _note(self, expr: Expr) -> None:
        """Expressions that ask nothing of the model."""
        match expr:
            case SetVariable(name, value):
                self.variables[name] = value
            case ScopeBegin(name):
                self.transcript.scope_begin(name)
            case ScopeEnd(name):
                self.variables[name] = self.transcript.scope_end(name)
            case SplitReasoning(name, model_type):
                self._split_reasoning(name, model_type)
            case Image(source):
                if not self.backend.takes_images:
                    raise self.backend.unsupported("images: it takes text only")
                self.transcript.add_image(source)
            case Video():
                raise self.backend.unsupported("videos")
            case _:
                raise TypeError(f"{expr!r} can only be traced, not run")

    def _fill(self, text: str) -> None:
        if self._turn is not None:
            self._turn.append(Fill(text))
            return
        if self._spec is not None:
            self._spec.fill(text)
        self.transcript.fill(text)

    def _set(self, name: str | None, value: Any, meta: dict[str, Any]) -> None:
        if name is not None:
            self.variables[name] = value
            self.meta_info[name] = meta

    def _prompt(self) -> Prompt:
        said = self.transcript
        turn = said.turn_text if said.role is not None else ""
        return Prompt(said.text, list(said.messages), list(said.images), said.role, turn, self._path)

    async def _generate(self, expr: Gen) -> None:
        sampling = expr.sampling.over(self.sampling)
        sampling = replace(sampling, stop=(*sampling.stops, *self.transcript.template.stop_str) or None)
        if self._turn is not None:
            self._turn.append(expr)
            return
        prompt, value = self._prompt(), ""
        if self._spec is not None:
            value, meta = await self._spec.take(self.backend, prompt, sampling)
            self.transcript.fill(value)
            self._set(expr.name, value, meta)
            return
        async with aclosing(self.backend.generate(prompt, sampling, self.streaming)) as pieces:
            async for piece, meta in pieces:
                if isinstance(piece, list):  # n > 1: the state goes on with the first
                    self.transcript.fill(piece[0])
                    self._set(expr.name, piece, meta)
                    return
                value += piece
                self.transcript.fill(piece)
                self._set(expr.name, value, meta)
                if self.streaming:
                    self._tell()
        self._path, self._committed = prompt.path, len(self.transcript.text)

    async def _generate_turn(self, parts: list[Expr]) -> None:
        """An assistant's turn on a chat model, as one call."""
        assert self._spec is not None
        values: list[str] = []
        meta: dict[str, Any] = {}
        gens = [part for part in parts if isinstance(part, Gen)]
        if gens:
            sampling = gens[0].sampling.over(self.sampling)
            values, meta = await complete_turn(
                self.backend, self._prompt(), parts, sampling, self._spec.num_tokens
            )
        left = iter(values)
        for part in parts:
            if isinstance(part, Gen):
                value = next(left)
                self._set(part.name, value, meta)
                self.transcript.fill(value)
            elif isinstance(part, Fill):
                self.transcript.fill(part.text)
        self._turn = None

    def _split_reasoning(self, name: str, model_type: str) -> None:
        if self.streaming:  # its text has been shown already
            return
        whole = self.variables[name]
        reasoning, answer = split_reasoning(whole, model_type, "model_type")
        self.variables[reasoning_name(name)] = reasoning
        self.variables[name] = answer
        self.transcript.replace_tail(whole, answer)
        self._path = TokenPath()

    async def _fork(self, children: Sequence[StreamExecutor]) -> None:
        if len(children) > 1 and self._committed < len(self.transcript.text):
            await self.backend.commit(self._prompt())
            self._committed = len(self.transcript.text)
        for child in children:
            child._begin(self)

    def _begin(self, parent: StreamExecutor) -> None:
        """The parent has come to the fork."""
        if self.error is not None:
            return
        self.transcript = parent.transcript.branch()
        self.variables, self.meta_info = dict(parent.variables), dict(parent.meta_info)
        self._path, self._committed = parent._path, parent._committed
        self._forked_at = len(self.transcript.text)
        if self._spec is not None and parent._spec is not None:
            self._spec.ahead = parent._spec.ahead
        with self._changed:
            self._done = 0
        self._start()
        self._tell()

    async def _join(self, join: Join) -> None:
        for child, upto in zip(join.children, join.upto, strict=True):
            await child.until(lambda child=child, upto=upto: child._done >= upto)  # type: ignore[misc]
        for child in join.children:
            if child.error is not None:
                raise child.error
        if join.mode == "concate_and_append":
            for child in join.children:
                self.transcript.fill(child.transcript.text[child._forked_at :])
            return
        names = {name: None for child in join.children for name in child.variables}
        for name in names:
            if name not in self.variables:
                self.variables[name] = [child.variables.get(name) for child in join.children]
