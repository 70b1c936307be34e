"""One of several API processes: `python -m trunkline.server.worker FD`, started by `server/supervisor.py`.

FD is the listening socket that all of them accept on. Standard input is a socket to the supervisor: JSON
lines in both directions, the first one `Begin`. It is a lifeline, too: when it closes, the supervisor is gone
and so is this process.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import msgspec
import uvloop

from trunkline.config.cli import argv
from trunkline.config.schema import EngineConfig
from trunkline.engine.client import EngineClient
from trunkline.engine.joined import JoinedTransport
from trunkline.engine.logs import set_up_logging
from trunkline.server.app import DrainingServer, serve
from trunkline.server.listen import tls_context
from trunkline.types import RequestError

LONGEST = 1 << 20  # bytes of a line


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """`number`: of the frontend. `folder`: where the core's socket is, and what processes count. `command`:
    how the server was started."""

    config: EngineConfig
    number: int
    folder: str
    command: str


class CoreEnded(msgspec.Struct, frozen=True, tag="core_ended"):
    reason: str


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Answer what is in progress, then end. The second time: at once."""

    why: str


class Serving(msgspec.Struct, frozen=True, tag="serving"):
    """The process answers requests now."""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The process can't serve."""

    message: str
    code: str


ToProcess = Begin | CoreEnded | Drain
FromProcess = Serving | Refused

_decode = msgspec.json.Decoder(ToProcess).decode


def line_of(message: ToProcess | FromProcess) -> bytes:
    return msgspec.json.encode(message) + b"\n"


class Supervised:
    """The process's end of the line to its supervisor (`app.Supervision`)."""

    def __init__(self, begin: Begin, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.number, self.folder, self.command = begin.number, begin.folder, begin.command
        self._reader, self._writer = reader, writer
        self._transport = JoinedTransport(begin.number, Path(begin.folder))
        self._server: DrainingServer | None = None

    async def launch(self, config: EngineConfig) -> EngineClient:
        return await EngineClient.join(self._transport, config)

    def serving(self, server: DrainingServer) -> None:
        self._server = server
        self._writer.write(line_of(Serving()))

    async def refuse(self, error: RequestError) -> None:
        self._writer.write(line_of(Refused(error.message, error.code)))
        await self._writer.drain()

    async def listen(self) -> None:
        """Do what the supervisor says, until it is gone."""
        while line := await self._reader.readline():
            match _decode(line):
                case CoreEnded(reason):
                    self._transport.ended(reason)
                case Drain(why):
                    if self._server is None:
                        os._exit(0)  # nothing has begun yet
                    self._server.drain(why)
        shutil.rmtree(self.folder, ignore_errors=True)  # the core does so, unless it was killed as well
        os._exit(1)


async def _run(listener: socket.socket, started: float) -> int:
    reader, writer = await asyncio.open_unix_connection(sock=socket.socket(fileno=0), limit=LONGEST)
    begin = _decode(await reader.readline())
    assert isinstance(begin, Begin)
    config = begin.config
    set_up_logging(config.server.log_level, config.observe.log_format)
    supervised = Supervised(begin, reader, writer)
    listening = asyncio.create_task(supervised.listen())
    try:
        tls = tls_context(config.server)
        await serve(config, listener, tls, started, supervised.launch, supervised)
    except RequestError as error:
        await supervised.refuse(error)
        return 2
    finally:
        listening.cancel()
    return 0


def main() -> int:
    started = time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # whole groups get them: it is the supervisor who says when
    (fd,) = argv()
    return uvloop.run(_run(socket.socket(fileno=int(fd)), started))


if __name__ == "__main__":
    sys.exit(main())
