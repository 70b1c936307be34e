"""Runs the expressions of one state, in order, as a coroutine on the programs' event loop.

Appending never waits: it queues the expression. Only reading a value does. A state without work has no task
and no thread, so that thousands of them cost nothing but their text."""

from __future__ import annotations

import asyncio
import linecache
import sys
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from trunkline.lang import ir
from trunkline.lang.backends.backend import Backend, Prompt, TokenPath
from trunkline.lang.global_config import global_config
from trunkline.lang.speculation import Speculation, complete_turn
from trunkline.lang.transcript import Transcript
from trunkline.text.reasoning import split_reasoning

T = TypeVar("T")
JoinMode = Literal["gather_variable", "concate_and_append"]
Origin = tuple[str, int]  # file and line of the program


@dataclass(frozen=True)
class Fork(ir.Expr):
    """The children go on from here."""

    children: Sequence[StreamExecutor]


@dataclass(frozen=True)
class Join(ir.Expr):
    """Waits for `children`, each up to its expression number `upto`, and takes over their text, or the
    variables `sets`."""

    children: Sequence[StreamExecutor]
    upto: Sequence[int]
    mode: JoinMode
    sets: tuple[str, ...]


class ProgramCancelled(Exception):
    """The program was given up before it ended."""


@dataclass(eq=False)
class Run:
    """One run of a program's function: what its state and all branches of it share."""

    backend: Backend
    sampling: ir.Sampling
    name: str = "program"
    streaming: bool = False
    eager: bool = False  # each append waits until it is done
    num_api_spec_tokens: int | None = None
    outer: Run | None = None  # the run whose function started this one
    tracing: bool = False
    thread: threading.Thread | None = None  # of the function, where it isn't its caller's
    ended: bool = False  # the function has returned
    error: Exception | None = None  # what ended it, and all that its states still had to do
    active: set[StreamExecutor] = field(default_factory=set)  # of this run and of those inside it
    change: asyncio.Event = field(default_factory=asyncio.Event)

    def lineage(self) -> list[Run]:
        """This run and those around it."""
        return [self, *(self.outer.lineage() if self.outer else ())]

    def tell(self) -> None:
        """Something has changed: whoever waits looks again."""
        change, self.change = self.change, asyncio.Event()
        change.set()

    def says_more(self) -> bool:
        """Whether what this thread reads may yet be appended, by a function that runs elsewhere."""
        return not self.ended and self.thread not in (None, threading.current_thread())


class StreamExecutor:
    """One state. Expressions are numbered from 1 in the order of `submit`; `_done` counts finished ones.

    The program's thread numbers and sends them; all else is written by the event loop only."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.backend = run.backend
        self.transcript = Transcript(run.backend.get_chat_template())
        self.variables: dict[str, Any] = {}
        self.meta_info: dict[str, dict[str, Any]] = {}
        self.error: Exception | None = None
        tokens = run.num_api_spec_tokens
        self._spec = None if tokens is None else Speculation(tokens)
        self._turn: list[ir.Expr] | None = None  # speculation on a chat model: what the open turn consists of
        self._path = TokenPath()
        self._committed = 0  # characters known to be in the prefix cache
        self._forked_at = 0  # where a child's own text begins
        self._submitted = self._done = 0
        self._writes: dict[str, int] = {}  # variable -> number of the expression that last sets it
        self._queue: deque[tuple[ir.Expr, Origin]] = deque()
        self._held = False  # until the parent gets to the fork
        self._task: asyncio.Task[None] | None = None

    # ------------------------------------------------------------------ from the program's thread
    def submit(self, expr: ir.Expr) -> None:
        """Queue an expression; after a failure, it will be dropped."""
        parts = list(expr.parts())
        for part in parts:
            self._submitted += 1
            self._writes |= dict.fromkeys(variables_of(part), self._submitted)
        global_config.loop().call_soon_threadsafe(self._enqueue, parts, program_line())
        if self.run.eager:
            self.sync()

    def fork(self, count: int) -> list[StreamExecutor]:
        """Children that go on from what this state has said when it gets here. Does not wait."""
        children = [StreamExecutor(self.run) for _ in range(count)]
        for child in children:
            child._held, child._done = True, -1  # what it inherits is there at number 0
            child._writes = dict.fromkeys(self._writes, 0)
        self.submit(Fork(children))
        return children

    def join(self, children: Sequence[StreamExecutor], mode: JoinMode) -> None:
        """Take over what `children` have been told to do up to now. Does not wait."""
        new = dict.fromkeys(name for one in children for name in one._writes if name not in self._writes)
        sets = tuple(new) if mode == "gather_variable" else ()
        self.submit(Join(children, [child._submitted for child in children], mode, sets))

    def fail(self, error: Exception) -> None:
        """End this state and its run with an error, aborting calls that are under way."""

        async def give_up() -> None:
            self.run.error = error
            for state in [self, *self.run.active]:
                if not state.finished:
                    state._fail(error)

        global_config.run(give_up())

    def cancel(self) -> None:
        """Give up what has not been done yet."""
        self.fail(ProgramCancelled(f"program {self.run.name!r} was cancelled"))

    def end(self) -> None:
        """The function has said all it will say."""
        self.run.ended = True
        global_config.loop().call_soon_threadsafe(self.run.tell)

    # ------------------------------------------------------------------ reading
    @property
    def idle(self) -> bool:
        """Everything submitted so far is done."""
        return self._done == self._submitted

    @property
    def finished(self) -> bool:
        """Nothing will change any more."""
        return self.error is not None or (self.run.ended and self.idle)

    def settled(self, name: str | None = None) -> Callable[[], bool]:
        """Asks whether a variable, or the whole state, is as this thread will find it. Waits for the last
        expression that sets it; and where another thread appends, for that thread's end."""
        more = self.run.says_more()

        def ready() -> bool:
            if self.error is not None or name not in self._writes:
                return self.error is not None or (self.idle and (self.run.ended or not more))
            return self._done >= self._writes[name] and (self.idle or not self._is_deferred(name))

        return ready

    def sync(self, name: str | None = None) -> None:
        """Wait until a variable, or everything, is settled. Raises as `check` does."""
        self.wait_until(self.settled(name))
        self.check(name)

    def check(self, name: str | None = None) -> None:
        """Raises the error that ended the state before `name` was settled, or KeyError for an unknown one."""
        known = name is not None and self._done >= self._writes.get(name, self._done + 1)
        if self.error is not None and not known:
            raise self.error
        if name is not None and self._is_deferred(name):
            raise KeyError(f"{name!r} is known at the end of the assistant's turn: read it after that")
        if name is not None and name not in self.variables:
            raise KeyError(f"the program sets no variable {name!r}; it has {', '.join(self.variables)}")

    def read(self, name: str) -> Any:
        """The value of `name`; waits and raises as `sync` does."""
        self.sync(name)
        return self.variables[name]

    def _is_deferred(self, name: str) -> bool:
        return any(isinstance(part, ir.Gen) and part.name == name for part in self._turn or ())

    def wait_until(self, ready: Callable[[], bool]) -> None:
        if not ready():
            self.wait(self.until(ready))

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of something on the loop. Who interrupts the waiting means the program."""
        try:
            return global_config.run(work)
        except KeyboardInterrupt:
            self.cancel()
            raise

    async def until(self, ready: Callable[[], bool]) -> None:
        """On the loop: wait until `ready()`, or an error."""
        while self.error is None and not ready():
            await self.run.change.wait()

    # ------------------------------------------------------------------ on the event loop
    def _enqueue(self, parts: Sequence[ir.Expr], origin: Origin) -> None:
        given_up = next((run.error for run in self.run.lineage() if run.error is not None), None)
        if self.error is None and given_up is not None:
            self._fail(given_up)
        if self.error is not None:
            self._fail_children(parts)
            return
        self._queue += [(part, origin) for part in parts]
        self._work()

    def _work(self) -> None:
        if self._queue and self._task is None and not self._held:
            self._task = asyncio.get_running_loop().create_task(self._drain())
            for run in self.run.lineage():
                run.active.add(self)

    def _rest(self) -> None:
        self._task = None
        for run in self.run.lineage():
            run.active.discard(self)

    async def _drain(self) -> None:
        while self._queue:
            expr, origin = self._queue.popleft()
            try:
                await self._execute(expr)
            except Exception as error:
                self._fail(error, expr, origin)
                return
            self._done += 1
            if not self._queue:
                self._rest()
            self.run.tell()

    def _fail(self, error: Exception, during: ir.Expr | None = None, origin: Origin | None = None) -> None:
        """End the state, and the children that still wait for it."""
        if origin is not None and not getattr(error, "__notes__", None):
            file, line = origin
            source = linecache.getline(file, line).strip()
            error.add_note(f'in program "{self.run.name}", {file}, line {line}: {source}')
        self.error = self.error or error
        left = [*([during] if during else ()), *(expr for expr, _ in self._queue)]
        self._queue.clear()
        if self._task is not None and during is None:  # from outside: the call that is under way ends too
            self._task.cancel()
        self._rest()
        self._fail_children(left)
        self.run.tell()

    def _fail_children(self, parts: Sequence[ir.Expr]) -> None:
        assert self.error is not None
        for part in parts:
            for child in part.children if isinstance(part, Fork) else ():
                child._fail(self.error)

    async def _execute(self, expr: ir.Expr) -> None:
        match expr:
            case ir.Fill(text):
                self._fill(text)
            case ir.Gen():
                await self._generate(expr)
            case ir.Select(name):
                decision = await self.backend.select(self._prompt(), expr)
                self._fill(decision.decision)
                self._set(name, decision.decision, dict(decision.meta_info))
            case ir.RoleBegin(role):
                self.transcript.role_begin(role)
                if role == "assistant" and self._spec is not None and self.backend.is_chat_model:
                    self._turn = []
            case ir.RoleEnd(role):
                if self._turn is not None:
                    await self._generate_turn(self._turn)
                self.transcript.role_end(role)
            case Fork(children):
                if len(children) > 1 and self._committed < len(self.transcript.text):
                    await self.backend.commit(self._prompt())
                    self._committed = len(self.transcript.text)
                for child in children:
                    child._begin(self)
            case Join():
                await self._join(expr)
            case _:
                self._note(expr)

    def _note(self, expr: ir.Expr) -> None:
        """Expressions that ask nothing of the model."""
        match expr:
            case ir.SetVariable(name, value):
                self.variables[name] = value
            case ir.ScopeBegin(name):
                self.transcript.scopes[name] = len(self.transcript.text)
            case ir.ScopeEnd(name):
                self.variables[name] = self.transcript.text[self.transcript.scopes.pop(name) :]
            case ir.SplitReasoning(name, model_type):
                self._split_reasoning(name, model_type)
            case ir.Image(source):
                if not self.backend.takes_images:
                    raise self.backend.unsupported("images: it takes text only")
                self.transcript.add_image(source)
            case ir.Video():
                raise self.backend.unsupported("videos")
            case _:
                raise TypeError(f"{expr!r} can only be traced, not run")

    def _fill(self, text: str) -> None:
        if self._turn is not None:
            self._turn.append(ir.Fill(text))
            return
        if self._spec is not None:
            self._spec.fill(text)
        self.transcript.text += text

    def _set(self, name: str | None, value: Any, meta: dict[str, Any]) -> None:
        if name is not None:
            self.variables[name] = value
            self.meta_info[name] = meta

    def _prompt(self) -> Prompt:
        said = self.transcript
        turn = said.turn_text if said.role is not None else ""
        return Prompt(said.text, list(said.messages), list(said.images), said.role, turn, self._path)

    async def _generate(self, expr: ir.Gen) -> None:
        if self._turn is not None:
            self._turn.append(expr)
            return
        said, prompt, value = self.transcript, self._prompt(), ""
        sampling = expr.sampling.over(self.run.sampling)
        sampling = replace(sampling, stop=(*sampling.stops, *said.template.stop_str) or None)
        if self._spec is not None:
            value, meta = await self._spec.take(self.backend, prompt, sampling)
            said.text += value
            self._set(expr.name, value, meta)
            return
        async with aclosing(self.backend.generate(prompt, sampling, self.run.streaming)) as pieces:
            async for piece, meta in pieces:
                if isinstance(piece, list):  # n > 1: the state goes on with the first
                    said.text += piece[0]
                    self._set(expr.name, piece, meta)
                    return
                value += piece
                said.text += piece
                self._set(expr.name, value, meta)
                if self.run.streaming:
                    self.run.tell()
        self._path, self._committed = prompt.path, len(said.text)

    async def _generate_turn(self, parts: list[ir.Expr]) -> None:
        """An assistant's turn on a chat model, as one call."""
        assert self._spec is not None
        values: list[str] = []
        meta: dict[str, Any] = {}
        gens = [part for part in parts if isinstance(part, ir.Gen)]
        if gens:
            sampling = gens[0].sampling.over(self.run.sampling)
            values, meta = await complete_turn(
                self.backend, self._prompt(), parts, sampling, self._spec.num_tokens
            )
        left = iter(values)
        for part in parts:
            if isinstance(part, ir.Gen):
                value = next(left)
                self._set(part.name, value, meta)
                self.transcript.text += value
            elif isinstance(part, ir.Fill):
                self.transcript.text += part.text
        self._turn = None

    def _split_reasoning(self, name: str, model_type: str) -> None:
        if self.run.streaming:  # its text has been shown already
            return
        whole = self.variables[name]
        reasoning, answer = split_reasoning(whole, model_type, "model_type")
        self.variables[ir.reasoning_name(name)] = reasoning
        self.variables[name] = answer
        self.transcript.text = self.transcript.text.removesuffix(whole) + answer
        self._path = TokenPath()

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
        self._held, self._done = False, 0
        self._work()
        self.run.tell()

    async def _join(self, join: Join) -> None:
        for child, upto in zip(join.children, join.upto, strict=True):
            await child.until(lambda child=child, upto=upto: child._done >= upto)  # type: ignore[misc]
        for child in join.children:
            if child.error is not None:
                raise child.error
        if join.mode == "concate_and_append":
            for child in join.children:
                self.transcript.text += child.transcript.text[child._forked_at :]
        for name in join.sets:
            self.variables[name] = [child.variables.get(name) for child in join.children]


def variables_of(expr: ir.Expr) -> tuple[str, ...]:
    """The variables that executing `expr` sets."""
    match expr:
        case Join():
            return expr.sets
        case ir.SplitReasoning(name):
            return name, ir.reasoning_name(name)
        case ir.Gen(str(name)) | ir.Select(str(name)) | ir.SetVariable(name) | ir.ScopeEnd(name):
            return (name,)
    return ()


def program_line() -> Origin:
    """Where the program's own code is, below the frames of this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if not module.startswith("trunkline.lang") and module != "contextlib":
            break
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
