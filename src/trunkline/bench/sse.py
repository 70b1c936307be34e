"""A small HTTP client for streams of server-sent events, on asyncio alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any
from urllib.parse import urlsplit

from trunkline.types import RequestError


class HttpError(RequestError):
    """The server answered with an error, or not in the way that was agreed on."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message, code="http_error", status=status)


async def events(url: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> AsyncGenerator[Any, None]:
    """POST `body` as JSON and yield the JSON of each `data:` line until `[DONE]`.

    Raises HttpError for an error status or an error event, OSError when the connection fails.
    """
    async with aclosing(request("POST", url, body, headers)) as lines:
        async for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            event = json.loads(data)
            if isinstance(event, dict) and event.get("error"):
                raise HttpError(_message(data), 200)
            yield event
    raise HttpError("the stream ended without [DONE]", 200)


async def fetch(url: str, headers: Mapping[str, str]) -> bytes:
    """GET a page. Raises HttpError or OSError."""
    async with aclosing(request("GET", url, None, headers)) as lines:
        return b"".join([line async for line in lines])


async def request(
    method: str, url: str, body: Mapping[str, Any] | None, headers: Mapping[str, str]
) -> AsyncGenerator[bytes, None]:
    """Send a request and yield the lines of its answer as they come."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    reader, writer = await asyncio.open_connection(
        parts.hostname, port, ssl=parts.scheme == "https" or None, limit=2**24
    )
    try:
        content = b"" if body is None else json.dumps(body).encode()
        fields = {
            "Host": parts.netloc,
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            "Connection": "close",
            **headers,
        }
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in fields.items())
        writer.write(head.encode() + b"\r\n" + content)
        await writer.drain()
        status, chunked = await _read_head(reader)
        pieces = _chunks(reader) if chunked else _rest(reader)
        async with aclosing(pieces), aclosing(_lines(pieces)) as lines:
            if status >= 400:
                text = b"".join([line async for line in lines])
                raise HttpError(f"{url}: HTTP {status}: {_message(text)}", status)
            async for line in lines:
                yield line
    finally:
        writer.close()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """(status, whether the body is chunked)."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    names = [line.lower().replace(" ", "") for line in head[1:]]
    return int(head[0].split()[1]), "transfer-encoding:chunked" in names


async def _chunks(reader: asyncio.StreamReader) -> AsyncGenerator[bytes, None]:
    while size := int((await reader.readline()).split(b";")[0] or b"0", 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _rest(reader: asyncio.StreamReader) -> AsyncGenerator[bytes, None]:
    while data := await reader.read(2**16):
        yield data


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    held = b""
    async for piece in pieces:
        *whole, held = (held + piece).split(b"\n")
        for line in whole:
            yield line
    if held:
        yield held


def _message(text: bytes) -> str:
    """The message of an error body in the OpenAI form, or the body itself."""
    try:
        error = json.loads(text)
        error = error.get("error", error)
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, AttributeError):
        return text[:300].decode(errors="replace")
