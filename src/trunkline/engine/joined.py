"""A frontend's line to a core that another process has started, watches and starts again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import zmq.asyncio

from trunkline.engine.client import SOCKET, core_socket
from trunkline.messages import FromCore, Hello, ToCore, decode_from_core, encode


class JoinedTransport:
    """`client.Transport` of the frontend with this number. Each core listens at the same place in `folder`;
    whoever watches over it must say when one has `ended`."""

    def __init__(self, frontend: int, folder: Path) -> None:
        self._frontend = frontend
        self._path = folder / SOCKET
        self._socket: zmq.asyncio.Socket | None = None
        self._ended: asyncio.Future[str] | None = None

    async def send(self, message: ToCore) -> None:
        if self._socket is not None:
            await self._socket.send(encode(message))

    async def run(self, deliver: Callable[[FromCore], None]) -> str:
        """The next core may not be there yet: what is sent waits for it."""
        socket = self._socket = core_socket(self._frontend, self._path)
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._ended = ended
        await self.send(Hello())
        reader = asyncio.create_task(_read(socket, deliver))
        try:
            return await ended
        finally:
            self._socket = None
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            socket.close()

    def ended(self, reason: str) -> None:
        """The core is gone: its requests end, and the next one is waited for."""
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(reason)

    async def dump_and_kill(self) -> None:
        """Ending a core is left to whoever watches over it; should it be well, it is connected to anew."""
        self.ended("no news from the engine")

    async def close(self, seconds: float) -> None:
        self.ended("left")


async def _read(socket: zmq.asyncio.Socket, deliver: Callable[[FromCore], None]) -> None:
    while True:
        deliver(decode_from_core(await socket.recv()))
