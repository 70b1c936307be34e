"""POST /v1/responses, and what asks for, cancels or deletes a response.

A response is a chat completion told in other words: its events are made from the chat's, so that tools,
reasoning, structured output and log-probabilities mean the same on both routes.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from trunkline.engine.fields import Number, OneOf, Rule, Text, Unsupported, read_fields
from trunkline.engine.frontend import Chunk, GenerationRequest, Prepared
from trunkline.engine.journal import Origin
from trunkline.server.call import Json, ServedModel
from trunkline.server.chat import ChatCall, parse_chat
from trunkline.server.endpoint import Access, Endpoint, Parts
from trunkline.server.framing import RESPONSES
from trunkline.server.http import json_response, read_json, read_query
from trunkline.server.respond import events_of, origin_of, respond
from trunkline.server.response_events import Narrator
from trunkline.server.response_store import ResponseStore, Stored
from trunkline.server.responses_input import NAMES, RESPONSES_FIELDS, chat_body, messages_of
from trunkline.types import RequestError

MAX_STORED = 4096  # responses

log = logging.getLogger(__name__)

_PAGE: Mapping[str, Rule] = {
    "limit": Number(1, 100),
    "order": OneOf(("asc", "desc")),
    "after": Text(),
    "include": Unsupported(),
}
_GET: Mapping[str, Rule] = {
    "include": Unsupported(),
    "stream": Unsupported(("false", 0.0), "only a new response streams"),
    "starting_after": Unsupported(),
    "include_obfuscation": Unsupported(("false", 0.0)),
}


def endpoints(parts: Parts) -> list[Endpoint]:
    own = Responses(parts)
    path, user = "/v1/responses", Access.USER
    return [
        Endpoint(path, ("POST",), own.create, user, RESPONSES_FIELDS, summary="The answer to some input"),
        Endpoint(path + "/{id}", ("GET",), own.get, user, query=_GET, summary="A stored response"),
        Endpoint(path + "/{id}", ("DELETE",), own.delete, user, summary="Forget a stored response"),
        Endpoint(path + "/{id}/cancel", ("POST",), own.cancel, user, summary="End one that still runs"),
        Endpoint(path + "/{id}/input_items", ("GET",), own.items, user, query=_PAGE, summary="Its input"),
    ]


@dataclass(frozen=True, kw_only=True)
class ResponsesCall:
    """A parsed request. `entry`: the response and what it came from; kept in `store` unless that is None."""

    chat: ChatCall
    entry: Stored
    stream: bool
    store: ResponseStore | None

    @property
    def requests(self) -> list[GenerationRequest]:
        return self.chat.requests

    @property
    def names(self) -> Mapping[str, str]:
        return {**{name: NAMES.get(other, other) for name, other in self.chat.names.items()}, **NAMES}

    async def events(
        self, batch: Sequence[Prepared], chunks: AsyncGenerator[Chunk, None]
    ) -> AsyncGenerator[Json, None]:
        narrator = Narrator(self.entry.response)
        begun = False
        try:
            async with aclosing(self.chat.events(batch, chunks)) as told:
                async for event in told:
                    if not begun:  # the engine has taken it: a refusal would have had a status of its own
                        begun = True
                        self._keep()
                        for said in narrator.begin():
                            yield said
                    for said in narrator.take(event):
                        yield said
            for said in narrator.end():
                yield said
        except RequestError as error:
            if not begun or not self.stream:
                raise
            for said in narrator.fail(error.message, error.code):
                yield said
        finally:
            narrator.leave()
            if begun:
                self._keep()

    def _keep(self) -> None:
        if self.store is not None:
            self.store.put(self.entry)

    def join(self, events: Sequence[Json]) -> Json:
        whole: Json = events[-1]["response"]
        return whole


class Responses:
    """The routes, over one store."""

    def __init__(self, parts: Parts, *, keeps: bool = True) -> None:
        self._parts = parts
        most_bytes = parts.frontend.config.server.response_store_bytes if keeps else 0
        self._store = ResponseStore(MAX_STORED, most_bytes)
        self._background: set[asyncio.Task[None]] = set()

    async def create(self, request: Request) -> ASGIApp:
        body = await read_json(request)
        call, background = await asyncio.to_thread(self.parse, body)  # what it continues may be long
        origin = origin_of(call, self._parts, request, body)
        if background:
            return await self._start(call, origin)
        return respond(call, self._parts, origin, RESPONSES)

    def parse(self, body: Json) -> tuple[ResponsesCall, bool]:
        """Check a request; whether it runs in the background. Raises RequestError."""
        fields = read_fields(RESPONSES_FIELDS, body)
        model = self._parts.model
        stream, background = fields.get("stream", False), fields.get("background", False)
        keeps = fields.get("store", self._store.enabled)
        if keeps and not self._store.enabled:
            raise RequestError(
                "store: this server keeps no responses (--response-store-size; --tokenizer-worker-num 1)",
                code="unsupported_field",
                param="store",
            )
        if background and (stream or not keeps):
            raise RequestError(
                "background needs store: true and stream: false: the response is asked for later",
                code="invalid_value",
                param="background",
            )
        if "input" not in fields:
            raise RequestError("input is missing", code="missing_field", param="input")
        before = self._before(fields.get("previous_response_id"))
        messages = before + messages_of(fields["input"], self._store.find_item)
        system = [{"role": "system", "content": fields["instructions"]}] if fields.get("instructions") else []
        rid = f"resp_{uuid.uuid4().hex}"
        try:
            chat = parse_chat(chat_body(fields, system + messages, rid), model)
        except RequestError as error:
            raise _in_our_words(error) from error
        entry = Stored(_blank(rid, fields, body, chat, model, keeps), _with_ids(fields["input"]), messages)
        return ResponsesCall(
            chat=chat, entry=entry, stream=stream, store=self._store if keeps else None
        ), background

    def _before(self, key: str | None) -> list[Json]:
        """The conversation up to and with a stored response."""
        if key is None:
            return []
        entry = self._store.get(key)
        if entry is None:
            raise _not_found(key, "previous_response_id")
        if entry.response["status"] in ("queued", "in_progress"):
            raise RequestError(
                f"the response {key[:100]!r} still runs",
                code="response_running",
                param="previous_response_id",
            )
        return entry.messages + messages_of(entry.response["output"], self._store.find_item)

    async def _start(self, call: ResponsesCall, origin: Origin) -> Response:
        """Run a call for nobody to wait for; what it can't be refused for any more becomes its status."""
        batch = await self._parts.frontend.prepare_all(call.requests)
        response = call.entry.response
        response |= {"status": "queued", "background": True}
        self._store.put(call.entry)

        async def run() -> None:
            try:
                async with aclosing(events_of(call, self._parts, origin, batch)) as events:
                    async for _ in events:
                        pass
            except RequestError as error:
                response.update(status="failed", error={"code": error.code, "message": error.message})
            except Exception:
                log.exception("response %s failed", response["id"])
                response.update(status="failed", error={"code": "server_error", "message": "internal error"})
            self._store.put(call.entry)

        task = asyncio.create_task(run())
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return json_response(response)

    # ------------------------------------------------------------------ stored responses
    def _stored(self, request: Request) -> Stored:
        key = request.path_params["id"]
        entry = self._store.get(key)
        if entry is None:
            raise _not_found(key, "response_id")
        return entry

    async def get(self, request: Request) -> Response:
        read_query(_GET, request)
        return json_response(self._stored(request).response)

    async def delete(self, request: Request) -> Response:
        entry = self._stored(request)
        key = entry.response["id"]
        if entry.response["status"] in ("queued", "in_progress"):
            raise RequestError(
                "the response still runs: cancel it first", code="response_running", status=409
            )
        self._store.delete(key)
        return json_response({"id": key, "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        entry = self._stored(request)
        if entry.response["status"] not in ("queued", "in_progress"):
            raise RequestError(
                f"the response is {entry.response['status']}: nothing is left to cancel",
                code="not_cancellable",
            )
        await self._parts.frontend.abort(entry.response["id"])
        entry.response["status"] = "cancelled"
        return json_response(entry.response)

    async def items(self, request: Request) -> Response:
        query = read_query(_PAGE, request)
        found = self._stored(request).items
        if query.get("order", "desc") == "desc":
            found = found[::-1]
        if "after" in query:
            ids = [item["id"] for item in found]
            if query["after"] not in ids:
                raise RequestError("after names no item of this response", code="not_found", param="after")
            found = found[ids.index(query["after"]) + 1 :]
        limit = int(query.get("limit", 20))
        page = found[:limit]
        ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
        return json_response({"object": "list", "data": page, **ends, "has_more": len(found) > limit})


def _not_found(key: str, param: str) -> RequestError:
    return RequestError(
        f"there is no response {key[:100]!r}: it was not stored, or it has left the store",
        code="response_not_found",
        param=param,
        status=404,
    )


def _in_our_words(error: RequestError) -> RequestError:
    """A chat request's error, in the fields of this route."""
    param = error.param or ""
    head = next((name for name in NAMES if param == name or param.startswith((f"{name}[", f"{name}."))), None)
    if head is None:
        return error
    message = error.message.replace(head, NAMES[head])
    return RequestError(message, code=error.code, param=NAMES[head] + param[len(head) :], status=error.status)


def _with_ids(items: Sequence[Json]) -> list[Json]:
    """Input items as they are listed: with ids, text content as parts."""
    prefixes = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
    listed = []
    for item in items:
        shown = {"id": f"{prefixes.get(item['type'], 'item')}_{uuid.uuid4().hex}", **item}
        if item["type"] == "message":
            kind = "output_text" if item["role"] == "assistant" else "input_text"
            shown |= {"content": [{"type": kind, "text": item["content"]}], "status": "completed"}
        listed.append(shown)
    return listed


def _blank(
    rid: str, fields: Mapping[str, Any], body: Json, chat: ChatCall, model: ServedModel, keeps: bool
) -> Json:
    """The response before anything has happened."""
    params = chat.requests[0].params
    return {
        "id": rid,
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": fields.get("instructions"),
        "max_output_tokens": fields.get("max_output_tokens"),
        "max_tool_calls": None,
        "model": model.name,
        "output": [],
        "parallel_tool_calls": fields.get("parallel_tool_calls", True),
        "previous_response_id": fields.get("previous_response_id"),
        "reasoning": {"effort": fields.get("reasoning", {}).get("effort"), "summary": None},
        "service_tier": "default",
        "store": keeps,
        "temperature": params.temperature,
        "text": {"format": (body.get("text") or {}).get("format") or {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "top_logprobs": fields.get("top_logprobs", 0),
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": fields.get("user"),
        "metadata": fields.get("metadata", {}),
    }
