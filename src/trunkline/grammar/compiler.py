"""Compiles grammars off the caller's thread, with a bound on time and memory, and remembers them.

A hostile grammar costs its sender an error within the time budget (promise P6): what is slow or large runs in
a sandbox process whose forks are killed, never in a thread of this one.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Protocol

from trunkline.grammar.backend import Backend, make_backend
from trunkline.grammar.json_text import Layout
from trunkline.grammar.protocol import Grammar, GrammarError, GrammarSpec, Vocabulary
from trunkline.grammar.sandbox import Sandbox

log = logging.getLogger(__name__)

ERROR_BYTES = 2 << 10  # of a remembered error
REMEMBERED_ERRORS = frozenset({"invalid_grammar", "unsupported_grammar"})


class Compile(Protocol):
    """Compiles in one thread; `prepare` makes ready for the next grammar, `close` frees what is held."""

    def __call__(self, spec: GrammarSpec) -> Grammar: ...

    def prepare(self) -> None: ...

    def close(self) -> None: ...


class SandboxedCompile:
    """First in a sandbox, then, by then known to be harmless, here."""

    def __init__(self, backend: Backend, sandbox: Sandbox) -> None:
        self._backend = backend
        self._sandbox = sandbox

    def __call__(self, spec: GrammarSpec) -> Grammar:
        text = self._sandbox.compile(spec)
        return self._backend.compile_text(text, spec.kind, self._backend.threads)

    def prepare(self) -> None:
        self._sandbox.start()

    def close(self) -> None:
        self._sandbox.close()


class GrammarCompiler:
    """Futures of compiled grammars: one compilation for equal specs, the most recently used kept.

    One compiler serves one tokenizer. `submit` may be called by any thread.
    """

    def __init__(
        self,
        workers: Sequence[Callable[[], Compile]],
        *,
        max_entries: int = 256,
        max_bytes: int = 256 << 20,
    ) -> None:
        """Each worker is made in a thread of its own, when there is work that no other thread takes."""
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._known: OrderedDict[GrammarSpec, Future[Grammar]] = OrderedDict()  # done; the latest used last
        self._running: dict[GrammarSpec, Future[Grammar]] = {}
        self._bytes = 0
        self._queue: SimpleQueue[tuple[GrammarSpec, Future[Grammar]] | None] = SimpleQueue()
        self._unstarted = list(workers)
        self._threads: list[threading.Thread] = []
        self._closed = False

    def submit(self, spec: GrammarSpec) -> Future[Grammar]:
        """A future of the grammar, or of its GrammarError; done already if it is known."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the compiler is closed")
            done = self._known.get(spec)
            if done is not None:
                self._known.move_to_end(spec)
                return done
            future = self._running.get(spec)
            if future is None:
                future = self._running[spec] = Future()
                future.set_running_or_notify_cancel()  # shared: one who gives up cancels it for nobody
                self._queue.put((spec, future))
                waiting = sum(not other.done() for other in self._running.values())
                if self._unstarted and waiting > len(self._threads):
                    self._start(self._unstarted.pop())
            return future

    def warm(self) -> None:
        """Have a worker ready for the first grammar."""
        with self._lock:
            if not self._threads and not self._closed:
                self._start(self._unstarted.pop())

    @property
    def waiting(self) -> int:
        """Grammars that are being compiled or wait for it."""
        return len(self._running)

    def close(self) -> None:
        """End the workers; grammars that still wait fail."""
        with self._lock:
            self._closed = True
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        for future in self._running.values():
            future.set_exception(GrammarError("the server stops", code="grammar_unavailable"))
        self._running.clear()

    def _start(self, worker: Callable[[], Compile]) -> None:
        thread = threading.Thread(target=self._work, args=(worker,), name="grammar", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self, worker: Callable[[], Compile]) -> None:
        compile_ = worker()
        try:
            self._prepare(compile_)
            while (job := self._queue.get()) is not None:
                if self._closed:
                    continue
                spec, future = job
                try:
                    future.set_result(compile_(spec))
                except GrammarError as error:
                    future.set_exception(error)
                except Exception:  # one grammar's fault ends one request
                    log.exception("compiling a grammar of kind %s", spec.kind)
                    fault = GrammarError("the grammar could not be compiled", code="grammar_unavailable")
                    future.set_exception(fault)
                self._remember(spec, future)
                self._prepare(compile_)
        finally:
            compile_.close()

    @staticmethod
    def _prepare(compile_: Compile) -> None:
        with contextlib.suppress(GrammarError, OSError):  # the next grammar's sender is told
            compile_.prepare()

    def _remember(self, spec: GrammarSpec, future: Future[Grammar]) -> None:
        error = future.exception()
        with self._lock:
            del self._running[spec]
            if isinstance(error, GrammarError) and error.code not in REMEMBERED_ERRORS:
                return  # perhaps the machine was busy
            self._known[spec] = future
            self._bytes += _size(spec, future)
            while len(self._known) > self._max_entries or self._bytes > self._max_bytes:
                self._bytes -= _size(*self._known.popitem(last=False))


def _size(spec: GrammarSpec, future: Future[Grammar]) -> int:
    held = ERROR_BYTES if future.exception() is not None else future.result().num_bytes
    return held + len(spec.source)


def backend_compiler(
    name: str,
    vocabulary: Vocabulary,
    eos_ids: Sequence[int],
    *,
    layout: Layout | None = None,
    seconds: float = 0.5,
    memory: int = 1 << 30,
    workers: int = 2,
    max_entries: int = 256,
    max_bytes: int = 256 << 20,
) -> GrammarCompiler:
    """A compiler with the backend `name`. `seconds` (CPU time) and `memory` (bytes) bound each grammar;
    `workers`: so many are compiled at once. Takes about 1 s for 150,000 tokens."""
    layout = layout or Layout()
    backend = make_backend(name, vocabulary, eos_ids, layout)

    def worker() -> Compile:
        sandbox = Sandbox(name, vocabulary, list(eos_ids), layout, seconds=seconds, memory=memory)
        return SandboxedCompile(backend, sandbox)

    return GrammarCompiler([worker] * workers, max_entries=max_entries, max_bytes=max_bytes)
