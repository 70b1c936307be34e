"""A small HTTP/1.1 client on asyncio: JSON in, JSON or server-sent events out, connections kept for reuse.

Programs, benchmarks, the terminal chat and replays speak to servers through it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import weakref
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any
from urllib.parse import urlsplit

from trunkline.types import RequestError

CONNECT_TIME = 30.0  # seconds
LINE_LIMIT = 2**26  # bytes of one line of an answer
BUSY = (429, 529)  # statuses of a server that has too much to do now
TRIES = 8  # about a minute, where the server does not say how long to wait

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class EndpointError(RequestError):
    """The server refused a request, or its answer broke off. Has the server's code, param and status."""


class HttpClient:
    """One server. Use it on one event loop; any number of requests may run at once.

    `verify`: False trusts any certificate, a path names the file of authorities to trust. A server that has
    too much to do is asked `tries` times.
    """

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str] | None = None,
        verify: bool | str | None = None,
        tries: int = TRIES,
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{base_url!r} is no address: it should look like http://127.0.0.1:30000")
        self._host, self._tls = parts.hostname, _tls(verify) if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._root = parts.path.rstrip("/")
        self._tries = tries
        fields = {"Host": parts.netloc, "Content-Type": "application/json", **(headers or {})}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._idle: list[Connection] = []
        self._finalizer: weakref.finalize[Any, HttpClient] | None = None  # closes them

    def close(self) -> None:
        """Close the connections that are kept; on the client's event loop."""
        while self._idle:
            self._idle.pop()[1].close()

    async def json(self, method: str, path: str, body: Any = None) -> Any:
        """The answer's JSON, or its text where it is none. Raises EndpointError, OSError."""
        async with aclosing(self._answer(method, path, body)) as pieces:
            text = b"".join([piece async for piece in pieces])
        try:
            return json.loads(text)
        except ValueError:
            return text.decode("utf-8", "replace")

    async def events(self, path: str, body: Any) -> AsyncGenerator[Any, None]:
        """POST; the JSON of each `data:` line until `[DONE]` or the end. Raises EndpointError, OSError."""
        held = b""
        async with aclosing(self._answer("POST", path, body)) as pieces:
            async for piece in pieces:
                *lines, held = (held + piece).split(b"\n")
                for line in lines:
                    data = line.removeprefix(b"data:").strip()
                    if data == line.strip() or not data or data == b"[DONE]":
                        continue
                    event = json.loads(data)
                    if isinstance(event, dict) and event.get("error"):
                        raise _refusal(data, 200)
                    yield event

    async def _answer(self, method: str, path: str, body: Any) -> AsyncGenerator[bytes, None]:
        """The answer's body in pieces. A server that has too much to do is asked again, when it says."""
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {self._root}{path} HTTP/1.1\r\n{self._head}Content-Length: {len(content)}\r\n\r\n"
        for attempt in range(self._tries):
            (reader, writer), status, fields = await self._send(head.encode() + content)
            whole = False
            try:
                async with aclosing(_body(reader, fields)) as pieces:
                    text = b"".join([piece async for piece in pieces]) if status >= 400 else b""
                    if status < 400:
                        async for piece in pieces:
                            yield piece
                whole = True
            except asyncio.IncompleteReadError as error:
                raise EndpointError("the answer broke off", code="connection_closed", status=502) from error
            finally:
                if whole and fields.get("connection", "").lower() != "close" and "@rest" not in fields:
                    self._idle.append((reader, writer))
                else:
                    writer.close()
            if status < 400:
                return
            if status not in BUSY or attempt == self._tries - 1:
                raise _refusal(text, status)
            await asyncio.sleep(_seconds(fields.get("retry-after"), 0.25 * 2**attempt))

    async def _send(self, request: bytes) -> tuple[Connection, int, dict[str, str]]:
        """(connection, status, header fields). A kept connection that the server has closed is replaced."""
        while True:
            reused = bool(self._idle)
            reader, writer = self._idle.pop() if reused else await self._connect()
            try:
                writer.write(request)
                await writer.drain()
                return (reader, writer), *await _read_head(reader)
            except (OSError, EOFError) as error:
                writer.close()
                if not reused:
                    raise EndpointError(
                        f"{self._host}:{self._port} closed the connection without an answer",
                        code="connection_closed",
                        status=502,
                    ) from error
            except BaseException:
                writer.close()
                raise

    async def _connect(self) -> Connection:
        if self._finalizer is None:
            self._finalizer = weakref.finalize(self, _close_later, self._idle, asyncio.get_running_loop())
        async with asyncio.timeout(CONNECT_TIME):
            reader, writer = await asyncio.open_connection(
                self._host, self._port, ssl=self._tls, limit=LINE_LIMIT
            )
        # The loop knows a reader only weakly: a call that nobody waits for would be collected on its way.
        writer.transport.get_protocol().reader = reader  # type: ignore[attr-defined]
        return reader, writer


def _close_later(idle: list[Connection], loop: asyncio.AbstractEventLoop) -> None:
    for _, writer in idle:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and its connections with it
            loop.call_soon_threadsafe(writer.close)


def _tls(verify: bool | str | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=verify if isinstance(verify, str) else None)
    if verify is False:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """(status, header fields with lowercase names; "@rest" marks a body that ends with the connection)."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines[1:] if line)
    fields = {name.strip().lower(): value.strip() for name, _, value in pairs}
    if not {"content-length", "transfer-encoding"} & fields.keys():
        fields["@rest"] = ""
    return int(lines[0].split()[1]), fields


async def _body(reader: asyncio.StreamReader, fields: Mapping[str, str]) -> AsyncGenerator[bytes, None]:
    if "content-length" in fields:
        yield await reader.readexactly(int(fields["content-length"]))
    elif "@rest" in fields:
        while data := await reader.read(2**16):
            yield data
    else:
        while size := int((await reader.readuntil(b"\n")).split(b";")[0], 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readuntil(b"\n")


def _seconds(header: str | None, otherwise: float) -> float:
    """How long to wait, of a Retry-After header; at most half a minute."""
    try:
        return min(float(header or otherwise), 30.0)
    except ValueError:  # a date
        return otherwise


def _refusal(text: bytes, status: int) -> EndpointError:
    """The error of a body in the OpenAI form, or of any other body."""
    try:
        error = json.loads(text)
        error = error.get("error", error)
        message, code, param = str(error["message"]), error.get("code"), error.get("param")
    except (ValueError, KeyError, AttributeError, TypeError):
        message, code, param = text[:300].decode("utf-8", "replace") or f"HTTP {status}", None, None
    return EndpointError(message, code=str(code or f"http_{status}"), param=param, status=status)
