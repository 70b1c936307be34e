"""Running a call and sending its events: as server-sent events, or joined as one JSON body."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from trunkline.engine.frontend import Chunk, Prepared
from trunkline.engine.journal import Origin
from trunkline.server.call import Call, Json, ServedModel
from trunkline.server.endpoint import Handler, Parts
from trunkline.server.framing import OPENAI, Framing
from trunkline.server.http import Sending, internal_error, json_response, read_json, until_disconnect
from trunkline.types import RequestError

TRACE_HEADERS = ("traceparent", "tracestate")
LARGE_BODY = 16384  # bytes; a larger request is parsed off the event loop

_STREAM_HEADERS = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))


def generation(
    parse: Callable[[Json, ServedModel], Call], parts: Parts, framing: Framing = OPENAI
) -> Handler:
    """A generating route. `parse` checks a body; it may take a while for a large one."""
    model = parts.model

    async def handle(request: Request) -> ASGIApp:
        body = await read_json(request)
        size = int(request.headers.get("content-length", LARGE_BODY + 1))
        call = parse(body, model) if size <= LARGE_BODY else await asyncio.to_thread(parse, body, model)
        return respond(call, parts, origin_of(call, parts, request, body), framing)

    return handle


def origin_of(call: Call, parts: Parts, request: Request, body: Json) -> Origin:
    """Where a call came from."""
    return Origin(
        route=request.url.path,
        request_id=request.scope["request_id"],
        body=body,
        names=call.names,
        defaults=parts.model.defaults,
        headers={name: request.headers[name] for name in TRACE_HEADERS if name in request.headers},
        size=int(request.headers.get("content-length", LARGE_BODY + 1)),
    )


def respond(call: Call, parts: Parts, origin: Origin, framing: Framing = OPENAI) -> ASGIApp:
    """The answer to a call. `framing`: how the events of a stream are written."""
    run = partial(events_of, call, parts, origin)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        sending = Sending(send)
        work = _stream(run, framing, scope, sending) if call.stream else _whole(call, run, scope, sending)
        await until_disconnect(receive, sending, work, scope["request_id"])

    return answer


async def complete(call: Call, parts: Parts, origin: Origin, priority: int) -> Any:
    """The whole answer to a call, of at most this priority. Raises RequestError: 503 where it was aborted."""
    async with aclosing(events_of(call, parts, origin, most_priority=priority, insists=True)) as events:
        return call.join([event async for event in events])


async def events_of(
    call: Call,
    parts: Parts,
    origin: Origin,
    batch: Sequence[Prepared] | None = None,
    *,
    most_priority: int | None = None,
    insists: bool = False,
) -> AsyncGenerator[Json, None]:
    """All events of a call, with errors in the names that its route uses. `batch`: its requests, if they are
    prepared already. `insists`: an abort is an error, not an end."""
    frontend, requests = parts.frontend, call.requests
    if most_priority is not None:
        default = frontend.config.scheduler.default_priority
        requests = [
            replace(one, priority=min(default if one.priority is None else one.priority, most_priority))
            for one in requests
        ]
    record = frontend.journal.begin(origin)
    try:
        if batch is None:
            batch = await frontend.prepare_all(requests)
        chunks = frontend.run(batch, record)
        if insists:
            chunks = _unless_aborted(chunks)
        async with aclosing(call.events(batch, chunks)) as events:
            async for event in events:
                yield event
    except RequestError as error:
        renamed = _renamed(error, call)
        frontend.journal.refused(record, renamed)
        raise renamed from error


async def _unless_aborted(chunks: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Chunk, None]:
    async with aclosing(chunks):
        async for chunk in chunks:
            if chunk.finish is not None and chunk.finish.kind == "abort":
                raise RequestError("the request was aborted", code="aborted", status=503)
            yield chunk


def _renamed(error: RequestError, call: Call) -> RequestError:
    param = error.param or ""
    name = call.names.get(param)
    if name is None:
        return error
    message = error.message.replace(param, name) if "_" in param else error.message  # not the word "prompt"
    return RequestError(
        message, code=error.code, param=name, status=error.status, retry_after=error.retry_after
    )


async def _whole(call: Call, run: Callable[[], AsyncGenerator[Json, None]], scope: Scope, send: Send) -> None:
    async with aclosing(run()) as events:
        body = call.join([event async for event in events])
    await json_response(body)(scope, _no_more, send)


async def _stream(
    run: Callable[[], AsyncGenerator[Json, None]], framing: Framing, scope: Scope, send: Send
) -> None:
    """Nothing is sent before the first event is there, so that a refusal still gets its own status."""

    async def send_data(data: bytes) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": True})

    async with aclosing(run()) as events:
        event: Json | None = await anext(events)
        headers = [(b"content-type", framing.media_type), *_STREAM_HEADERS]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            while event is not None:
                await send_data(framing.frame(event))
                event = await anext(events, None)
        except RequestError as error:
            await send_data(framing.frame(framing.envelope(error)))
        except Exception as error:
            fault = internal_error(error, scope["request_id"])
            await send_data(framing.frame(framing.envelope(fault)))
    await send({"type": "http.response.body", "body": framing.end})


async def _no_more() -> Any:
    return {"type": "http.disconnect"}
