"""Running a call and sending its events: as server-sent events, or joined as one JSON body."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from trunkline.engine.frontend import Frontend
from trunkline.engine.journal import Origin
from trunkline.server.call import Call, Json, ServedModel
from trunkline.server.endpoint import Handler, Parts
from trunkline.server.http import error_body, internal_error, json_response, read_json, until_disconnect
from trunkline.types import RequestError

TRACE_HEADERS = ("traceparent", "tracestate")
LARGE_BODY = 16384  # bytes; a larger request is parsed off the event loop

_SSE_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


def generation(parse: Callable[[Json, ServedModel], Call], parts: Parts) -> Handler:
    """A generating route. `parse` checks a body; it may take a while for a large one."""
    model, frontend = parts.model, parts.frontend

    async def handle(request: Request) -> ASGIApp:
        body = await read_json(request)
        size = int(request.headers.get("content-length", LARGE_BODY + 1))
        call = parse(body, model) if size <= LARGE_BODY else await asyncio.to_thread(parse, body, model)
        origin = Origin(
            route=request.url.path,
            request_id=request.scope["request_id"],
            body=body,
            names=call.names,
            defaults=model.defaults,
            headers={name: request.headers[name] for name in TRACE_HEADERS if name in request.headers},
            size=size,
        )
        run = partial(_run, call, frontend, origin)

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            work = _stream(run, scope, send) if call.stream else _whole(call, run, scope, send)
            await until_disconnect(receive, work)

        return answer

    return handle


async def _run(call: Call, frontend: Frontend, origin: Origin) -> AsyncGenerator[Json, None]:
    """All events of a call, with errors in the names that its route uses."""
    record = frontend.journal.begin(origin)
    try:
        batch = await frontend.prepare_all(call.requests)
        async with aclosing(call.events(batch, frontend.run(batch, record))) as events:
            async for event in events:
                yield event
    except RequestError as error:
        renamed = _renamed(error, call)
        frontend.journal.refused(record, renamed)
        raise renamed from error


def _renamed(error: RequestError, call: Call) -> RequestError:
    param = error.param or ""
    name = call.names.get(param)
    if name is None:
        return error
    message = error.message.replace(param, name) if "_" in param else error.message  # not the word "prompt"
    return RequestError(message, code=error.code, param=name, status=error.status)


async def _whole(call: Call, run: Callable[[], AsyncGenerator[Json, None]], scope: Scope, send: Send) -> None:
    async with aclosing(run()) as events:
        body = call.join([event async for event in events])
    await json_response(body)(scope, _no_more, send)


async def _stream(run: Callable[[], AsyncGenerator[Json, None]], scope: Scope, send: Send) -> None:
    """Nothing is sent before the first event is there, so that a refusal still gets its own status."""

    async def send_data(data: bytes) -> None:
        await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})

    async with aclosing(run()) as events:
        event: Json | None = await anext(events)
        await send({"type": "http.response.start", "status": 200, "headers": list(_SSE_HEADERS)})
        try:
            while event is not None:
                await send_data(msgspec.json.encode(event))
                event = await anext(events, None)
        except RequestError as error:
            await send_data(msgspec.json.encode(error_body(error)))
        except Exception as error:
            await send_data(msgspec.json.encode(error_body(internal_error(error, scope["request_id"]))))
    await send_data(b"[DONE]")
    await send({"type": "http.response.body", "body": b""})


async def _no_more() -> Any:
    return {"type": "http.disconnect"}
