"""What a program holds in its hand: a state that it appends to and reads from, and groups of forked
states."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, aclosing, contextmanager
from typing import Any, Self

from trunkline.lang.executor import JoinMode, StreamExecutor
from trunkline.lang.global_config import global_config
from trunkline.lang.ir import RoleBegin, RoleEnd, ScopeBegin, ScopeEnd, SetVariable, as_expr, turn
from trunkline.lang.tracer import Tracer


class ProgramState:
    """A program's text so far and its variables. Appending does not wait, reading does.

    Whatever ended the program early is raised, as it was, by everything that reads.
    """

    def __init__(self, executor: StreamExecutor | Tracer) -> None:
        self.stream_executor: Any = executor
        self.ret_value: Any = None  # what the program's function returned

    # ------------------------------------------------------------------ appending
    def __iadd__(self, other: Any) -> Self:
        if other is None:
            raise ValueError("None was added to a state")
        self.stream_executor.submit(as_expr(other))
        return self

    def system(self, expr: Any = None) -> Any:
        return self._role("system", expr)

    def user(self, expr: Any = None) -> Any:
        return self._role("user", expr)

    def assistant(self, expr: Any = None) -> Any:
        return self._role("assistant", expr)

    def _role(self, role: str, expr: Any) -> Any:
        """A whole turn, or without `expr` a context manager: what is appended inside is the turn."""
        if expr is None:
            return self._between(RoleBegin(role), RoleEnd(role))
        whole = turn(role, expr)
        self.stream_executor.submit(whole)
        return whole

    def var_scope(self, name: str) -> AbstractContextManager[None]:
        """What is appended inside becomes variable `name`."""
        return self._between(ScopeBegin(name), ScopeEnd(name))

    @contextmanager
    def _between(self, begin: Any, end: Any) -> Iterator[None]:
        self.stream_executor.submit(begin)
        yield
        self.stream_executor.submit(end)

    # ------------------------------------------------------------------ variables
    def __contains__(self, name: str) -> bool:
        self.sync()
        return name in self.stream_executor.variables

    def get_var(self, name: str) -> Any:
        """The value of a variable: waits for it. Raises KeyError for one that nothing sets."""
        return self.stream_executor.read(name)

    def set_var(self, name: str, value: Any) -> None:
        self.stream_executor.submit(SetVariable(name, value))

    __getitem__, __setitem__ = get_var, set_var

    def get_meta_info(self, name: str) -> dict[str, Any]:
        """What the backend said about the call that set `name`."""
        self.stream_executor.sync(name)
        meta: dict[str, Any] = self.stream_executor.meta_info[name]
        return meta

    # ------------------------------------------------------------------ the whole
    def text(self) -> str:
        self.sync()
        text: str = self.stream_executor.transcript.text
        return text

    def messages(self) -> list[dict[str, Any]]:
        """The closed turns, in the OpenAI form."""
        self.sync()
        return list(self.stream_executor.transcript.messages)

    def sync(self) -> None:
        """Wait until everything that was appended is done, of a stream all that its function appends."""
        self.stream_executor.sync()

    def error(self) -> Exception | None:
        """What ended the program early, or None; waits like `sync`."""
        try:
            self.sync()
        except Exception as error:
            return error
        failed: Exception | None = self.stream_executor.error
        return failed

    # ------------------------------------------------------------------ branches
    def fork(self, size: int = 1, position_ids_offset: Sequence[int] | None = None) -> ProgramStateGroup:
        """`size` states that go on from here, each on its own and all at once."""
        if position_ids_offset is not None:
            raise ValueError("position_ids_offset is not supported: branches share positions with the prefix")
        children = self.stream_executor.fork(size)
        return ProgramStateGroup([ProgramState(child) for child in children], self)

    @contextmanager
    def copy(self) -> Iterator[ProgramState]:
        """A state of its own that goes on from here; this one does not see what happens to it."""
        (child,) = self.stream_executor.fork(1)
        yield ProgramState(child)

    # ------------------------------------------------------------------ streaming
    def text_iter(self, var_name: str | None = None) -> Iterator[str]:
        """New text of the state, or of a variable, as it comes; all at once if the run doesn't stream."""
        executor = self.stream_executor
        pieces = self._pieces(var_name, executor.settled(var_name))
        try:
            while (piece := executor.wait(anext(pieces, None))) is not None:
                if piece[0]:
                    yield piece[0]
        finally:
            executor.wait(pieces.aclose())

    async def text_async_iter(
        self, var_name: str | None = None, return_meta_data: bool = False
    ) -> AsyncIterator[Any]:
        """`text_iter` for asyncio. With `return_meta_data`: pairs of text and what is known of the call."""
        pieces = self._pieces(var_name, self.stream_executor.settled(var_name))
        async with aclosing(global_config.each(pieces)) as found:
            async for text, meta in found:
                if return_meta_data:
                    yield text, meta
                elif text:
                    yield text

    async def _pieces(
        self, name: str | None, settled: Callable[[], bool]
    ) -> AsyncGenerator[tuple[Any, dict[str, Any]], None]:
        """New text and the call's meta data, on the programs' loop. A value that is no text comes whole, and
        the last token may add to the meta data only."""
        executor, seen, done = self.stream_executor, 0, False
        shown: dict[str, Any] = {}

        def unseen() -> Any:
            value = executor.transcript.text if name is None else executor.variables.get(name, "")
            return value[seen:] if isinstance(value, str) else "" if seen else value

        while not done:
            await executor.until(lambda: settled() or (executor.run.streaming and bool(unseen())))
            done = executor.error is not None or settled()
            new, meta = unseen(), executor.meta_info.get(name, {})
            if new or (done and meta and meta is not shown):
                seen, shown = seen + (len(new) if isinstance(new, str) else 1), meta
                yield new, meta
        executor.check(name)


class ProgramStateGroup:
    """States that were forked together."""

    def __init__(self, states: list[ProgramState], parent: ProgramState) -> None:
        self.states = states
        self._parent = parent

    def __getitem__(self, i: int) -> ProgramState:
        return self.states[i]

    def __setitem__(self, i: int, state: ProgramState) -> None:
        """For `forks[0] += "..."`. Raises ValueError for another state."""
        if state is not self.states[i]:
            raise ValueError("a branch can't be replaced: append to it")

    def __len__(self) -> int:
        return len(self.states)

    def __iter__(self) -> Iterator[ProgramState]:
        return iter(self.states)

    def __iadd__(self, other: Any) -> Self:
        """Append to every state: the same, item i of a list to state i, or what a function gives for i."""
        if isinstance(other, list | tuple):
            if len(other) != len(self.states):
                raise ValueError(f"{len(other)} items for {len(self.states)} states")
            items = list(other)
        elif callable(other):
            function: Callable[[int], Any] = other
            items = [function(i) for i in range(len(self.states))]
        else:
            items = [other] * len(self.states)
        for state, item in zip(self.states, items, strict=True):
            state += item
        return self

    def join(self, mode: JoinMode = "gather_variable") -> None:
        """Bring the branches together. `gather_variable`: each variable that they set becomes one of the
        parent, a list with a value per branch. `concate_and_append`: their texts follow the parent's, one
        after the other. An error of a branch becomes the parent's."""
        if mode not in ("gather_variable", "concate_and_append"):
            raise ValueError(f"mode is {mode!r}; it must be gather_variable or concate_and_append")
        self._parent.stream_executor.join([state.stream_executor for state in self.states], mode)
