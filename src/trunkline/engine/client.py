"""The frontend's end of an engine core: streams of outputs by request, health, restart. Asyncio, no torch."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import math
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import zmq
import zmq.asyncio

from trunkline.config.schema import EngineConfig
from trunkline.engine.process import serve
from trunkline.engine.unread import MAX_UNREAD, Unread
from trunkline.messages import (
    Abort,
    AbortAnywhere,
    AddRequest,
    Done,
    EndSession,
    Failed,
    FlushCache,
    FromCore,
    GetSnapshot,
    GetStats,
    Gone,
    Heartbeat,
    Hello,
    Outputs,
    Pause,
    PauseMode,
    ProfileDone,
    Ready,
    Resume,
    Shutdown,
    Snapshot,
    StartProfile,
    Stats,
    StopProfile,
    ToCore,
    TokensOut,
    decode_from_core,
    encode,
)
from trunkline.types import FinishReason, RequestError

Answer = Done | Stats | Snapshot | ProfileDone

log = logging.getLogger(__name__)

MAX_RESTARTS, RESTART_WINDOW = 3, 600.0  # deaths within so many seconds after which the core stays dead
DUMP_TIME = 2.0  # seconds that a stalled core gets to write its stacks down
STOP_TIME = 10.0  # seconds that a core gets to stop by itself
CLOSED = "closed"
CORE = "trunkline.engine.process"  # what a core's process runs
PREFIX, SOCKET = "trunkline-", "core.sock"  # of the private folder's name; the core's socket in it


@dataclass(frozen=True)
class Health:
    """`ok` only while the core makes progress; `reason` says what is wrong, or "ok"."""

    ok: bool
    reason: str


class Transport(Protocol):
    """How messages reach one core, from its start to its end."""

    async def send(self, message: ToCore) -> None: ...

    async def run(self, deliver: Callable[[FromCore], None]) -> str:
        """Start a core, deliver what it says until it ends, and return why it ended."""
        ...

    async def dump_and_kill(self) -> None:
        """End a core that has stalled, after writing its stacks to standard error."""
        ...

    async def close(self, seconds: float) -> None:
        """End the core, which gets so long to do it by itself."""
        ...


class EngineClient:
    """One engine core, restarted when it dies. Requests that were in it end with a 503 that says why."""

    def __init__(
        self, transport: Transport, watchdog_timeout: float, max_restarts: float = MAX_RESTARTS
    ) -> None:
        self.ready: Ready | None = None
        self.steps = 0
        self.paused = False
        self.on_death: Callable[[str], object] = lambda reason: None  # told before its requests are
        self.on_abort: Callable[[str], Coroutine[Any, Any, None]] | None = None  # AbortAnywhere
        self.fatal = asyncio.Event()  # set when the core stays dead
        self._transport = transport
        self._watchdog_timeout = watchdog_timeout
        self._max_restarts = max_restarts
        self._streams: dict[str, Unread] = {}
        self._aborts: set[asyncio.Task[None]] = set()
        self._calls: dict[str, asyncio.Future[Answer]] = {}
        self._problem: str | None = "starting"
        self._last_beat = time.monotonic()
        self._deaths: list[float] = []
        self._failure: Failed | None = None
        self._up = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def launch(
        cls, config: EngineConfig, module: str = CORE, folder: Path | None = None
    ) -> EngineClient:
        """Start a core in a process of its own, which runs `module`. In `folder` other frontends find its
        socket, `SOCKET`. Raises RequestError."""
        transport = ProcessTransport(config, module, folder)
        return await cls(transport, config.server.watchdog_timeout)._start()

    @classmethod
    async def join(cls, transport: Transport, config: EngineConfig) -> EngineClient:
        """Share a core that another process starts, and starts again when it dies."""
        return await cls(transport, config.server.watchdog_timeout, math.inf)._start()

    @classmethod
    async def in_process(cls, config: EngineConfig) -> EngineClient:
        """Start a core in a thread of this process. Raises RequestError when it can't start."""
        return await cls(ThreadTransport(config), config.server.watchdog_timeout)._start()

    async def _start(self) -> EngineClient:
        self._tasks = [asyncio.create_task(self._keep_running()), asyncio.create_task(self._watch())]
        ended = asyncio.create_task(self.fatal.wait())
        up = asyncio.create_task(self._up.wait())
        await asyncio.wait((up, ended), return_when=asyncio.FIRST_COMPLETED)
        up.cancel()
        ended.cancel()
        if self.ready is None:
            failure = self._failure or Failed(
                self._problem or "the engine core did not start", "start_failed"
            )
            await self.close()
            raise RequestError(failure.message, code=failure.code, status=500)
        return self

    # ------------------------------------------------------------------ requests
    async def stream(self, request: AddRequest) -> AsyncGenerator[TokensOut, None]:
        """Yield the outputs of a request until its last. Leaving early aborts it.

        Raises RequestError (`engine_dead`, 503) when the core is down or dies on the way.
        """
        if request.rid in self._streams:
            raise RequestError(
                f"a request with id {request.rid!r} is still running: ids of live requests are unique",
                code="duplicate_rid",
                param="rid",
            )
        self._require_alive()
        outputs = Unread()
        self._streams[request.rid] = outputs
        finished = False
        try:
            await self._transport.send(request)
            while not finished:
                item = await outputs.get()
                if isinstance(item, RequestError):
                    finished = True
                    raise item
                finished = item.finish is not None
                yield item
        finally:
            self._streams.pop(request.rid, None)
            if not finished and self._problem is None:
                await self._transport.send(Abort(request.rid))

    async def abort(self, rid: str) -> None:
        """End a request; its stream gets an aborted last output. Unknown ids are ignored."""
        if rid in self._streams:
            await self._transport.send(Abort(rid))
            reason = FinishReason("abort", message="aborted", code="aborted")
            self._streams[rid].put(TokensOut(rid=rid, finish=reason))

    async def abort_all(self) -> None:
        await self._transport.send(Abort("", all=True))

    async def abort_anywhere(self, rid: str) -> None:
        """Have the other frontends of the core end what their clients know by this id."""
        await self._transport.send(AbortAnywhere(rid))

    async def gone(self, frontend: int) -> None:
        """Tell the core of a frontend that has died: its requests end."""
        await self._transport.send(Gone(frontend))

    async def end_session(self, session: str) -> None:
        if self._problem is None:  # a core that starts anew knows of no session
            await self._transport.send(EndSession(session))

    async def flush_cache(self) -> Done:
        answer = await self._call(FlushCache)
        assert isinstance(answer, Done)
        return answer

    async def pause(self, mode: PauseMode) -> Done:
        """Run no step until `resume`; returns when that holds. What `mode` does is said in `Pause`."""
        answer = await self._call(partial(Pause, mode=mode))
        assert isinstance(answer, Done)
        self.paused = True
        return answer

    async def resume(self) -> Done:
        answer = await self._call(Resume)
        assert isinstance(answer, Done)
        self.paused = False
        return answer

    async def stats(self) -> Stats:
        answer = await self._call(GetStats)
        assert isinstance(answer, Stats)
        return answer

    async def snapshot(self) -> Snapshot:
        """What the engine looks like now."""
        answer = await self._call(GetSnapshot)
        assert isinstance(answer, Snapshot)
        return answer

    async def start_profile(
        self,
        *,
        folder: str,
        name: str,
        num_steps: int | None,
        activities: list[Literal["CPU", "GPU"]],
        with_stack: bool,
        record_shapes: bool,
    ) -> ProfileDone:
        answer = await self._call(
            lambda call: StartProfile(
                call=call,
                folder=folder,
                name=name,
                num_steps=num_steps,
                activities=activities,
                with_stack=with_stack,
                record_shapes=record_shapes,
            )
        )
        assert isinstance(answer, ProfileDone)
        return answer

    async def stop_profile(self) -> ProfileDone:
        answer = await self._call(StopProfile)
        assert isinstance(answer, ProfileDone)
        return answer

    async def _call(self, question: Callable[[str], ToCore]) -> Answer:
        """`question` makes the message that is answered, from the name of the call."""
        self._require_alive()
        call = uuid.uuid4().hex
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._calls[call] = answer
        try:
            await self._transport.send(question(call))
            return await answer
        finally:
            self._calls.pop(call, None)

    def _require_alive(self) -> None:
        if self._problem is not None:
            raise self._dead()

    def _dead(self) -> RequestError:
        return RequestError(f"the engine is not available: {self._problem}", code="engine_dead", status=503)

    # ------------------------------------------------------------------ life of the core
    @property
    def health(self) -> Health:
        return Health(self._problem is None, self._problem or "ok")

    async def close(self, at_once: bool = False) -> None:
        """Stop the core, free all it holds; `at_once`: also in the middle of a step. Safe to call twice."""
        self._problem = CLOSED
        self._fail_all()
        await self._transport.close(0.0 if at_once else STOP_TIME)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _keep_running(self) -> None:
        while True:
            self._last_beat = time.monotonic()
            reason = await self._transport.run(self._deliver)
            if self._problem == CLOSED:
                return
            self._problem = self._failure.message if self._failure else reason
            if self.ready is not None:  # else the caller of launch is told
                log.error("the engine core ended: %s", self._problem)
                self.on_death(self._problem)
            self._fail_all()
            now = time.monotonic()
            self._deaths = [at for at in self._deaths if now - at < RESTART_WINDOW] + [now]
            if self.ready is None or len(self._deaths) > self._max_restarts:
                self.fatal.set()
                return
            self._problem += " (restarting)"
            self._failure = None

    async def _watch(self) -> None:
        """End a core that makes no progress, after writing its state down (P10)."""
        while True:
            await asyncio.sleep(min(1.0, self._watchdog_timeout / 4))
            silent = time.monotonic() - self._last_beat
            if self._problem is None and silent > self._watchdog_timeout:
                self._problem = f"no progress for {silent:.0f} s, the limit is {self._watchdog_timeout:.0f} s"
                log.error("the engine core stalls: %s", self._problem)
                await self._transport.dump_and_kill()

    def _deliver(self, message: FromCore) -> None:
        self._last_beat = time.monotonic()
        match message:
            case Outputs():
                for item in message.items:
                    stream = self._streams.get(item.rid)
                    if stream is not None and not stream.put(item):
                        self._give_up(item.rid)
            case Stats() | Done() | Snapshot() | ProfileDone():
                answer = self._calls.get(message.call)
                if answer is not None and not answer.done():
                    answer.set_result(message)
            case Heartbeat():
                self.steps, self.paused = message.steps, message.paused
            case Ready():
                self.ready, self._problem = message, None
                self._up.set()
            case Failed():
                self._failure = message
            case AbortAnywhere():
                if self.on_abort is not None:
                    self._later(self.on_abort(message.rid))

    def _give_up(self, rid: str) -> None:
        """Nobody takes what a request says: it must not be kept without bound."""
        log.warning("request %s: more than %d entries of its output are unread: aborted", rid, MAX_UNREAD)
        self._streams.pop(rid).fail(
            RequestError(
                f"the client did not read: more than {MAX_UNREAD} tokens of output were waiting for it",
                code="slow_reader",
                status=503,
            )
        )
        self._later(self._transport.send(Abort(rid)))

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    def _fail_all(self) -> None:
        error = self._dead()
        for stream in self._streams.values():
            stream.fail(error)
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(error)


class ProcessTransport:
    """A core in a child process, over a socket in a private folder that is gone once both are connected.
    With a given folder it stays: others connect there."""

    def __init__(self, config: EngineConfig, module: str = CORE, folder: Path | None = None) -> None:
        self._config = config
        self._module = module
        self._process: asyncio.subprocess.Process | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._shared = folder
        self._folder: Path | None = None  # to remove

    async def send(self, message: ToCore) -> None:
        if self._socket is not None:
            await self._socket.send(encode(message))

    async def run(self, deliver: Callable[[FromCore], None]) -> str:
        folder = self._shared
        if folder is None:
            folder = self._folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        path = folder / SOCKET
        socket = self._socket = core_socket(0, path)
        await self.send(Hello())
        try:
            process = self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", self._module, str(path), stdin=asyncio.subprocess.PIPE
            )
            assert process.stdin is not None
            process.stdin.write(self._config.to_json() + b"\n")
            reader = asyncio.create_task(self._read(socket, deliver))
            try:
                code = await process.wait()
                await asyncio.sleep(0.05)  # its last words may still be on the way
            finally:
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)
            return _exit_reason(code)
        finally:
            self._release()

    async def _read(self, socket: zmq.asyncio.Socket, deliver: Callable[[FromCore], None]) -> None:
        while True:
            message = decode_from_core(await socket.recv())
            self._remove_folder()  # connected: the path has served, and can't be left behind any more
            deliver(message)

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _release(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._remove_folder()
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def dump_and_kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGUSR1)
            await asyncio.sleep(DUMP_TIME)
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def close(self, seconds: float) -> None:
        await self.send(Shutdown())
        if self._process is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), seconds)
        self._release()
        if self._process is not None:
            await self._process.wait()  # killed or not: none is left behind


def core_socket(frontend: int, path: Path) -> zmq.asyncio.Socket:
    """The line of the frontend with this number to the core that listens on `path`, now or soon."""
    socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    for option, value in ((zmq.LINGER, 0), (zmq.SNDHWM, 0), (zmq.RCVHWM, 0), (zmq.RECONNECT_IVL, 20)):
        socket.setsockopt(option, value)
    socket.setsockopt(zmq.ROUTING_ID, b"%d" % frontend)
    socket.connect(f"ipc://{path}")
    return socket


def _exit_reason(code: int) -> str:
    if code < 0:
        return f"the engine process was killed by {signal.Signals(-code).name}"
    return f"the engine process exited with status {code}"


class ThreadTransport:
    """A core in a thread of this process; messages are passed as they are."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._inbox: queue.SimpleQueue[ToCore | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def send(self, message: ToCore) -> None:
        self._inbox.put(message)

    async def run(self, deliver: Callable[[FromCore], None]) -> str:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        self._inbox.put(Hello())

        def work() -> None:
            serve(self._config, _ThreadChannel(self._inbox, loop, deliver))
            _call_in(loop, ended.set)

        self._thread = threading.Thread(target=work, name="trunkline-core", daemon=True)
        self._thread.start()
        await ended.wait()
        return "the engine thread ended"

    async def dump_and_kill(self) -> None:
        """A thread can't be ended from outside: its stack is all that is to be had."""
        faulthandler.dump_traceback()

    async def close(self, seconds: float) -> None:
        """Works at interpreter exit too, when no thread can be started to wait in."""
        self._inbox.put(Shutdown())
        deadline = time.monotonic() + seconds
        while self._thread is not None and self._thread.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.005)


class _ThreadChannel:
    """The core's side of a ThreadTransport (`process.Channel`)."""

    def __init__(
        self,
        inbox: queue.SimpleQueue[ToCore | None],  # None only wakes
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[FromCore], None],
    ) -> None:
        self._inbox, self._loop, self._deliver = inbox, loop, deliver

    def receive(self, timeout: float) -> list[tuple[int, ToCore]]:
        messages: list[ToCore | None] = []
        with contextlib.suppress(queue.Empty):
            messages.append(self._inbox.get(timeout > 0, timeout))
            while True:
                messages.append(self._inbox.get_nowait())
        return [(0, message) for message in messages if message is not None]

    def wake(self) -> None:
        self._inbox.put(None)

    def send(self, message: FromCore, to: int) -> None:
        _call_in(self._loop, self._deliver, message)


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: FromCore) -> None:
    with contextlib.suppress(RuntimeError):  # the event loop may be closed by now: nobody listens
        loop.call_soon_threadsafe(function, *args)
