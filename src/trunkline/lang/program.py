"""A program: a function of a state, and the ways to run it."""

from __future__ import annotations

import inspect
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from trunkline.lang import batch
from trunkline.lang.backends.backend import Backend, Prompt
from trunkline.lang.backends.engine import EngineBackend
from trunkline.lang.executor import Run, StreamExecutor
from trunkline.lang.global_config import global_config
from trunkline.lang.interpreter import ProgramState
from trunkline.lang.ir import Sampling, run_sampling
from trunkline.lang.tracer import Argument, Tracer

CHUNK = 200  # rows that run_batch(generator_style=True) runs ahead
PRECACHE_CHARACTERS = 64  # a shorter common prefix is not worth a call

log = logging.getLogger(__name__)

# Sampling parameters that a run takes; those of a single `gen` only are left out.
RUN_FIELDS = frozenset(field.name for field in fields(Sampling)) - {"dtype", "regex", "json_schema"}


class SglFunction:
    """What `@function` makes of a function whose first parameter is `s`.

    `run` and `run_batch` take sampling parameters beside the program's own arguments; a `gen` that gives one
    itself wins over them."""

    def __init__(
        self,
        func: Callable[..., Any],
        num_api_spec_tokens: int | None = None,
        bind_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises TypeError if the first parameter is not called s."""
        parameters = list(inspect.signature(func).parameters.values())
        if not parameters or parameters[0].name != "s":
            raise TypeError(f"the first parameter of {func.__qualname__} must be s, the program's state")
        self.func = func
        self.num_api_spec_tokens = num_api_spec_tokens
        self.bind_arguments = dict(bind_arguments or {})
        named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.arg_names = [one.name for one in parameters[1:] if one.kind in named]
        free = [one for one in parameters[1:] if one.kind in named and one.name not in self.bind_arguments]
        self._free = [one.name for one in free]
        self._required = sum(one.default is one.empty for one in free)
        self.__name__, self.__doc__ = func.__name__, func.__doc__

    def bind(self, **kwargs: Any) -> SglFunction:
        """The same program with some arguments fixed."""
        return type(self)(self.func, self.num_api_spec_tokens, {**self.bind_arguments, **kwargs})

    def __call__(self, *args: Any, **kwargs: Any) -> ProgramState:
        """`run`; inside another program, on its backend, and traced where that is traced."""
        outer = global_config.scope.get()
        if outer is not None:
            kwargs.setdefault("backend", outer.backend)
            if outer.tracing:
                return self.trace(*args, **kwargs)
        return self.run(*args, **kwargs)

    # ------------------------------------------------------------------ running
    def run(
        self, *args: Any, stream: bool = False, backend: Any = None, use_thread: bool = True, **kwargs: Any
    ) -> ProgramState:
        """Run the function here and return its state, whose values are ready when they are read.

        With `stream`, the function runs in a thread, and the state's iterators show text as it comes. Without
        `use_thread`, each append waits until it is done. What the function raises, this raises.
        """
        if stream and self.num_api_spec_tokens is not None:
            raise ValueError("num_api_spec_tokens generates ahead of the program: it can't be streamed")
        sampling, arguments = self._split(kwargs)
        state = self.start(resolve_backend(backend), sampling, streaming=stream, eager=not use_thread)
        if stream:
            thread = threading.Thread(target=self.quietly, args=(state, args, arguments), daemon=True)
            state.stream_executor.run.thread = thread
            thread.start()
        else:
            self._enter(state, args, arguments)
        return state

    def run_batch(
        self,
        batch_kwargs: Sequence[Mapping[str, Any] | Sequence[Any]],
        *,
        backend: Any = None,
        num_threads: int | str = "auto",
        progress_bar: bool = False,
        generator_style: bool = False,
        **sampling: Any,
    ) -> list[ProgramState] | Iterator[ProgramState]:
        """Run the program once for each row of arguments (dicts or tuples); states in the order of the rows.

        At most `num_threads` rows are under way at once (auto: 96, or 16 per core). Rows that begin alike run
        one after the other. A row that fails ends no other: its state raises when it is read. With
        `generator_style` an iterator, which runs chunks of rows as it gets to them."""
        given, unknown = self._split(sampling)
        if unknown:
            raise TypeError(f"run_batch() got an unexpected keyword argument {next(iter(unknown))!r}")
        rows = [self._row(row) for row in batch_kwargs]
        if not rows:
            return iter(()) if generator_style else []
        resolved = resolve_backend(backend)
        order = self._prepare(len(rows), resolved)
        width = max(96, 16 * (os.cpu_count() or 1)) if num_threads == "auto" else int(num_threads)
        states = batch.run(
            rows,
            order,
            lambda: self.start(resolved, given),
            self.quietly,
            width=max(1, min(width, len(rows))),
            chunk=CHUNK if generator_style else len(rows),
            progress_bar=progress_bar,
        )
        return states if generator_style else list(states)

    def _prepare(self, num_rows: int, backend: Backend) -> list[str]:
        """Trace the program before a batch: cache the prefix that all rows share, and learn in which order
        the text uses the arguments."""
        if num_rows < 2 or not global_config.enable_precache_with_tracing:
            return self.arg_names
        tracer = self.trace(backend=backend).stream_executor
        self._cache_prefix(tracer, backend)
        return list(dict.fromkeys([*tracer.arguments(), *self.arg_names]))

    def _row(self, row: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
        if isinstance(row, Mapping):
            return dict(row)
        if isinstance(row, str) or not self._required <= len(row) <= len(self._free):
            raise ValueError(f"the row {row!r} doesn't fit the program's arguments ({', '.join(self._free)})")
        return dict(zip(self._free, row, strict=False))

    def _split(self, kwargs: dict[str, Any]) -> tuple[Sampling, dict[str, Any]]:
        """Sampling parameters of the run, and arguments; what the program names itself is an argument."""
        mine = {name: kwargs[name] for name in kwargs if name in RUN_FIELDS and name not in self.arg_names}
        return run_sampling(mine), {name: value for name, value in kwargs.items() if name not in mine}

    def start(self, backend: Backend, sampling: Sampling, **options: Any) -> ProgramState:
        """A state that has said nothing yet; `options` are fields of Run."""
        outer, tokens = global_config.scope.get(), self.num_api_spec_tokens
        run = Run(backend, sampling, self.__name__, outer=outer, num_api_spec_tokens=tokens, **options)
        return ProgramState(StreamExecutor(run))

    def quietly(self, state: ProgramState, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Run the function on `state`, which keeps what it raises."""
        try:
            self._enter(state, args, kwargs)
        except Exception as error:
            log.debug("%s ends: %r", self.__name__, error)

    def _enter(self, state: ProgramState, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        executor = state.stream_executor
        token = global_config.scope.set(executor.run)
        try:
            state.ret_value = self.func(state, *args, **{**self.bind_arguments, **kwargs})
        except Exception as error:
            executor.fail(error)
            raise
        except BaseException:  # such as KeyboardInterrupt
            executor.cancel()
            raise
        finally:
            global_config.scope.reset(token)
            executor.end()
        if global_config.verbosity >= 2:
            print(state.text())

    # ------------------------------------------------------------------ tracing
    def trace(self, *args: Any, backend: Any = None, **kwargs: Any) -> ProgramState:
        """Follow the program without running it; arguments that are not given stay unknown.

        The state's `stream_executor.nodes` are what it appends, up to where it needs a value.
        """
        tracer = Tracer(resolve_backend(backend))
        state = ProgramState(tracer)
        given = {**self.bind_arguments, **dict(zip(self._free, args, strict=False)), **kwargs}
        arguments = {
            name: given.get(name, Argument(name)) for name in {**dict.fromkeys(self.arg_names), **given}
        }
        token = global_config.scope.set(Run(tracer.backend, Sampling(), tracing=True))
        try:
            state.ret_value = self.func(state, **arguments)
        except Exception as reason:  # a trace ends where it needs a value, in whatever way that shows
            log.debug("the trace of %s ends: %r", self.__name__, reason)
        finally:
            global_config.scope.reset(token)
        return state

    def cache(self, backend: Any = None) -> None:
        """Have the text with which every run begins in the backend's prefix cache."""
        resolved = resolve_backend(backend)
        self._cache_prefix(self.trace(backend=resolved).stream_executor, resolved)

    def _cache_prefix(self, tracer: Tracer, backend: Backend) -> None:
        prefix = tracer.prefix(backend.get_chat_template())
        if len(prefix) > PRECACHE_CHARACTERS:
            global_config.run(backend.commit(Prompt(prefix)))


def resolve_backend(given: Any) -> Backend:
    """The backend meant by what a caller passed (or by the default): a Backend, something with an `endpoint`
    such as a Runtime, or an in-process Engine. Raises TypeError for anything else."""
    backend = global_config.default_backend if given is None else given
    if backend is None:
        raise TypeError("no backend: call set_default_backend(...), or pass backend=...")
    backend = getattr(backend, "endpoint", backend)
    if isinstance(backend, Backend):
        return backend
    if hasattr(backend, "async_generate"):
        return EngineBackend(backend)
    raise TypeError(f"{given!r} is no backend: give a RuntimeEndpoint, Runtime, Engine, OpenAI or Anthropic")
