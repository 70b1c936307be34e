"""A process that compiles grammars for another one, and may be killed at any time: `python -m` this module.

What a stranger sends is compiled here first, each in a fork of its own with a bound on memory and CPU time.
Only what came through is compiled a second time where it is used, at a cost that is known by then. Messages
are msgpack over the socket at standard input; at its end the process ends.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NoReturn

import msgspec
import psutil  # type: ignore[import-untyped]

from trunkline.grammar.json_text import Layout
from trunkline.grammar.protocol import GrammarError, GrammarSpec, Vocabulary

if TYPE_CHECKING:
    from trunkline.grammar.backend import Backend

START_TIME = 60.0  # seconds for a sandbox to come up; building the token trie takes one
HASTE = 1.2  # seconds after which a grammar that has computed for more than ENOUGH is given up
ENOUGH = 0.1  # seconds; what people write takes less
LOOK = 0.05  # seconds between looks at it from then on
PATIENCE = 20  # times the seconds that a grammar may compute: at idle priority it may get none for long


class Setup(msgspec.Struct, frozen=True):
    """First message: the vocabulary, and the bounds."""

    pieces: list[bytes]
    special_ids: list[int]
    eos_ids: list[int]
    spaces: str
    backend: str
    memory: int  # bytes of address space on top of what the process has when it is ready
    seconds: float  # of computation for each grammar


class Answer(msgspec.Struct, frozen=True):
    """The grammar's text, or the error; both empty: the sandbox is ready."""

    text: str = ""
    message: str = ""
    code: str = ""
    pointer: str = ""


class PieceTable:
    """A vocabulary of bytes alone; nothing is tokenized in the sandbox."""

    def __init__(self, setup: Setup) -> None:
        self._pieces = setup.pieces
        self.special_ids = frozenset(setup.special_ids)

    @property
    def num_tokens(self) -> int:
        return len(self._pieces)

    def piece(self, token_id: int) -> bytes:
        return self._pieces[token_id]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return []

    def encode_words(self, text: str) -> tuple[list[int], list[int]]:
        return [], []


class Sandbox:
    """The parent's end. One compilation at a time; used by one thread."""

    def __init__(
        self,
        backend: str,
        vocabulary: Vocabulary,
        eos_ids: list[int],
        layout: Layout,
        *,
        seconds: float,
        memory: int,
    ) -> None:
        self._seconds = seconds
        self._setup = msgspec.msgpack.encode(
            Setup(
                [vocabulary.piece(token) for token in range(vocabulary.num_tokens)],
                sorted(vocabulary.special_ids),
                eos_ids,
                layout.spaces,
                backend,
                memory,
                seconds,
            )
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def compile(self, spec: GrammarSpec) -> str:
        """The grammar's text. Raises GrammarError; `grammar_too_complex` if it takes too long or too much."""
        data = None
        # One that ends before its time was perhaps killed while it was idle: a fresh one tells.
        for _ in range(2):
            connection = self._start()
            with contextlib.suppress(EOFError, OSError):
                connection.send_bytes(msgspec.msgpack.encode(spec))
                data = self._receive(connection)
                break
            self.close()
        if data is None:
            self.close()
            data = msgspec.msgpack.encode(_beyond(self._seconds))
        answer = msgspec.msgpack.decode(data, type=Answer)
        if answer.code:
            raise GrammarError(answer.message, code=answer.code, pointer=answer.pointer)
        return answer.text

    def _receive(self, connection: Connection) -> bytes | None:
        end, wait = time.monotonic() + PATIENCE * self._seconds, min(HASTE, PATIENCE * self._seconds)
        while not connection.poll(wait):
            if time.monotonic() > end:
                return None
            assert self._process is not None
            with contextlib.suppress(psutil.Error):
                for fork in psutil.Process(self._process.pid).children():
                    times = fork.cpu_times()
                    if times.user + times.system > ENOUGH:
                        fork.kill()
            wait = LOOK
        return connection.recv_bytes()

    def start(self) -> None:
        """Have it ready before the first grammar comes."""
        self._start()

    def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # with what it forked
            self._process.wait()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def _start(self) -> Connection:
        if self._connection is not None and self._process is not None and self._process.poll() is None:
            return self._connection
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__], stdin=theirs.fileno(), process_group=0
            )
        self._connection = Connection(ours.detach())
        ready = None
        with contextlib.suppress(EOFError, OSError):
            self._connection.send_bytes(self._setup)
            ready = _receive(self._connection, START_TIME)
        if ready is None:
            self.close()
            raise GrammarError("the grammar compiler does not start", code="grammar_unavailable")
        return self._connection


def _receive(connection: Connection, seconds: float) -> bytes | None:
    return connection.recv_bytes() if connection.poll(seconds) else None


def _beyond(seconds: float) -> Answer:
    return Answer(
        message=f"the grammar needs too long (at most {seconds:g} s of a core) or too much memory to compile",
        code="grammar_too_complex",
    )


def main() -> int:
    """The sandbox's own side."""
    from trunkline.grammar.backend import make_backend

    # It takes only what is left: whoever computes for others wakes up at once, which nice does not give.
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's user means the parent
    connection = Connection(socket.socket(fileno=0).detach())
    setup = msgspec.msgpack.decode(connection.recv_bytes(), type=Setup)
    backend = make_backend(setup.backend, PieceTable(setup), setup.eos_ids, Layout(setup.spaces))
    gc.freeze()  # forks share what is there
    connection.send_bytes(msgspec.msgpack.encode(Answer()))
    with contextlib.suppress(EOFError, OSError):  # the other end has gone
        while True:
            data = connection.recv_bytes()
            child = os.fork()
            if child == 0:
                _compile(backend, setup, data, connection)
            if os.waitpid(child, 0)[1]:
                connection.send_bytes(msgspec.msgpack.encode(_beyond(setup.seconds)))
    return 0


def _compile(backend: Backend, setup: Setup, data: bytes, connection: Connection) -> NoReturn:
    """Answer and end this process; without an answer and with another status if it is beyond its bounds."""
    limit = _address_space() + setup.memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, setup.seconds)
    spec = msgspec.msgpack.decode(data, type=GrammarSpec)
    try:
        text = backend.write(spec)
        backend.compile_text(text, spec.kind)
        answer = Answer(text)
    except GrammarError as error:
        answer = Answer("", error.message, error.code, error.pointer)
    except (MemoryError, RecursionError):
        os._exit(1)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    signal.setitimer(signal.ITIMER_PROF, 0)
    connection.send_bytes(msgspec.msgpack.encode(answer))
    os._exit(0)


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(main())
