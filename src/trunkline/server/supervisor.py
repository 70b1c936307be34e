"""Several API processes that accept on one socket, before one engine core (`--tokenizer-worker-num`).

The supervisor answers nothing itself. It starts the core and the processes, tells the core when one of them
has died and the processes when the core has, starts again what died, and passes on when all are to end. Each
process speaks to the core directly.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import uvloop

from trunkline.config.cli import environment_with, launch_command
from trunkline.config.resolve import Resolved
from trunkline.config.schema import EngineConfig
from trunkline.engine.client import MAX_RESTARTS, PREFIX, RESTART_WINDOW, EngineClient
from trunkline.engine.logs import set_up_logging
from trunkline.metrics.prometheus import SHARED_VARIABLE, forget_gauges
from trunkline.server.app import SEND_TIME, ready_line
from trunkline.server.listen import listening, tls_context, warn_if_exposed
from trunkline.server.worker import LONGEST, Begin, CoreEnded, Drain, FromProcess, Refused, ToProcess, line_of
from trunkline.types import RequestError

MODULE = "trunkline.server.worker"  # what an API process runs
END_TIME = 5.0  # seconds that processes get to end, beyond what their clients get

_decode = msgspec.json.Decoder(FromProcess).decode

log = logging.getLogger(__name__)


def run_processes(resolved: Resolved) -> None:
    """Serve until SIGTERM or SIGINT; then as `app.run_server`, with all processes.

    Raises RequestError when the server can't start, when its engine stays dead, or its processes do.
    """
    config = resolved.config
    set_up_logging(config.server.log_level, config.observe.log_format)
    started = time.monotonic()
    tls_context(config.server)  # what is wrong with it is told before anything starts
    with listening(config.server) as listener:
        warn_if_exposed(config.server, listener)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        try:
            uvloop.run(_Supervisor(config, listener, folder, started).run())
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class _Api:
    """A running API process. Closing `writer` ends it, whatever it does."""

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def tell(self, message: ToProcess) -> None:
        self.writer.write(line_of(message))


class _Supervisor:
    def __init__(self, config: EngineConfig, listener: socket.socket, folder: Path, started: float) -> None:
        self._config = config
        self._listener = listener
        self._folder = folder
        self._started = started
        self._numbers = itertools.count(1)  # of frontends: none is used twice
        self._running: dict[int, _Api] = {}  # by number
        self._serving = [asyncio.Event() for _ in range(config.server.processes)]
        self._announced = False
        self._deaths: list[float] = []
        self._client: EngineClient | None = None
        self._ending = asyncio.Event()
        self._problem: RequestError | None = None
        self._signals = 0

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signaled, number)
        others = [asyncio.create_task(self._engine()), asyncio.create_task(self._announce())]
        keepers = [asyncio.create_task(self._keep(slot)) for slot in range(self._config.server.processes)]
        try:
            await self._ending.wait()
            self._listener.close()  # connections are refused from now on, not left waiting
            await asyncio.wait(keepers, timeout=self._config.server.drain_timeout + SEND_TIME + END_TIME)
        finally:
            for api in self._running.values():
                with contextlib.suppress(ProcessLookupError):
                    api.process.kill()
            for task in (*others, *keepers):
                task.cancel()
            await asyncio.gather(*others, *keepers, return_exceptions=True)
            if self._client is not None:
                await self._client.close(at_once=self._signals > 1)
        if self._problem is not None:
            raise self._problem

    # ------------------------------------------------------------------ the end
    def _signaled(self, number: signal.Signals) -> None:
        self._signals += 1
        self._end(signal.Signals(number).name)

    def _end(self, why: str, problem: RequestError | None = None) -> None:
        """Called again, it ends what is still going on at once."""
        if self._problem is None:
            self._problem = problem
        if not self._announced:
            log.info("stopped while starting")
        self._ending.set()
        self._tell_all(Drain(why))

    def _tell_all(self, message: ToProcess) -> None:
        for api in self._running.values():
            api.tell(message)

    # ------------------------------------------------------------------ the core
    async def _engine(self) -> None:
        try:
            client = await EngineClient.launch(self._config, folder=self._folder)
        except RequestError as error:
            self._end("the engine could not start", error)
            return
        self._client = client
        client.on_death = lambda reason: self._tell_all(CoreEnded(reason))
        await client.fatal.wait()
        self._end("the engine stays dead", RequestError(client.health.reason, code="engine_dead", status=503))

    # ------------------------------------------------------------------ the API processes
    async def _announce(self) -> None:
        for serving in self._serving:
            await serving.wait()
        self._announced = True
        count = len(self._serving)
        print(f"{ready_line(self._config, self._listener, self._started)}, {count} API processes", flush=True)

    async def _keep(self, slot: int) -> None:
        """See that a process runs, until the end."""
        while not self._ending.is_set():
            number = next(self._numbers)
            refusal = await self._run_one(slot, number)
            if self._client is not None:
                await self._client.gone(number)
            if not self._ending.is_set():
                self._count_death(refusal)

    def _count_death(self, refusal: RequestError | None) -> None:
        now = time.monotonic()
        self._deaths = [at for at in self._deaths if now - at < RESTART_WINDOW] + [now]
        if self._announced and len(self._deaths) <= MAX_RESTARTS:
            return
        message = f"API processes died {len(self._deaths)} times within {RESTART_WINDOW:g} s"
        if not self._announced:
            message = "an API process died while starting"
        self._end(message, refusal or RequestError(message, code="process_dead", status=503))

    async def _run_one(self, slot: int, number: int) -> RequestError | None:
        """Run a process to its end; returns what it said of it, if anything."""
        api = self._running[number] = await self._start(slot, number)
        refusal = None
        try:
            while line := await api.reader.readline():
                message = _decode(line)
                if isinstance(message, Refused):
                    refusal = RequestError(message.message, code=message.code, status=500)
                else:
                    self._serving[slot].set()
            code = await api.process.wait()
        except ConnectionResetError:  # it was killed with something unread
            code = await api.process.wait()
        finally:
            del self._running[number]
            api.writer.close()
        forget_gauges(str(self._folder), api.process.pid)
        if not self._ending.is_set():
            log.error("API process %d (pid %d) ended with status %d", number, api.process.pid, code)
        return refusal

    async def _start(self, slot: int, number: int) -> _Api:
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_unix_connection(sock=ours, limit=LONGEST)
            fd = self._listener.fileno()
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", MODULE, str(fd), stdin=theirs.fileno(), pass_fds=(fd,),
                env=environment_with(SHARED_VARIABLE, str(self._folder)),
            )  # fmt: skip
        api = _Api(process, reader, writer)
        part = part_of(self._config, slot, number)
        api.tell(Begin(part, number, str(self._folder), launch_command()))
        if self._ending.is_set():
            api.tell(Drain("the server ends"))
        return api


def part_of(config: EngineConfig, slot: int, number: int) -> EngineConfig:
    """What one process is told: its part of the limits that are counted there, and a seed of its own, so that
    no two draw the same seeds for requests that name none."""
    server, model = config.server, config.model
    most, rest = divmod(server.max_concurrent, server.processes)
    return msgspec.structs.replace(
        config,
        server=msgspec.structs.replace(server, max_concurrent=most + (slot < rest)),
        model=msgspec.structs.replace(model, seed=model.seed + number),
    )
