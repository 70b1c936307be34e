"""Runs batches: line by line, behind interactive requests, from where the last process left off."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import msgspec

from trunkline.engine.fields import OneOf, Rule, Text, read_fields
from trunkline.engine.journal import Origin
from trunkline.server.call import Call, Json
from trunkline.server.chat import parse_chat
from trunkline.server.completions import parse_completion
from trunkline.server.endpoint import Parts
from trunkline.server.http import error_body, internal_error
from trunkline.server.respond import complete
from trunkline.server.responses import Responses
from trunkline.server.storage import LIVE, Storage, file_gone, lines_of
from trunkline.server.vectors import parse_embeddings
from trunkline.types import RequestError

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MAX_LINES = 50_000  # of one batch; OpenAI's own bound
MAX_ERRORS = 100  # of a file that is not valid, that are told
PRIORITY = -(2**30)  # behind everything else
POLL = 1.0  # seconds between looks for news from other processes
RETRY = 0.5  # seconds before a line is tried again that the server had no room for
READ = 64  # lines read at once
FINAL = ("file_gone", "storage_full")  # errors that another try would meet again

log = logging.getLogger(__name__)


class BatchRunner:
    """Runs the batches of one model. Of several servers that share a storage, one at a time does."""

    def __init__(self, storage: Storage, parts: Parts) -> None:
        self._storage = storage
        self._parts = parts
        self._owner = parts.model.name
        self._slots = asyncio.Semaphore(parts.frontend.config.server.batch_running)
        self._news = asyncio.Event()
        self._work: dict[str, asyncio.Task[None]] = {}
        self._cancelled: set[str] = set()
        self._longest = parts.frontend.config.server.max_body  # bytes of a line
        self._parse = _parsers(parts)

    def wake(self) -> None:
        """There may be a new batch, or one to cancel."""
        self._news.set()

    async def run(self) -> None:
        """Until it is cancelled. What is in progress then goes on with the next run."""
        try:
            with contextlib.ExitStack() as held:
                locked = False
                while True:
                    if self._storage.exists:
                        locked = locked or self._lock(held)
                        if locked:
                            await self._look()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._news.wait(), POLL)
                    self._news.clear()
        finally:
            for task in self._work.values():
                task.cancel()
            await asyncio.gather(*self._work.values(), return_exceptions=True)
            self._storage.close()

    def _lock(self, held: contextlib.ExitStack) -> bool:
        """Become the one that runs this model's batches, unless another process is."""
        name = hashlib.sha256(self._owner.encode()).hexdigest()[:16]
        with contextlib.ExitStack() as opened:
            try:
                file = opened.enter_context((self._storage.folder / f"runner-{name}.lock").open("wb"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
            held.enter_context(opened.pop_all())
            return True

    async def _look(self) -> None:
        try:
            live = await self._storage.run(self._storage.live_batches, self._owner)
        except RequestError as error:
            log.error("batches: %s", error.message)
            return
        for batch in live:
            key = batch["id"]
            if batch["status"] == "cancelling":
                self._cancelled.add(key)
            if key not in self._work:
                task = self._work[key] = asyncio.create_task(self._run_batch(batch))
                task.add_done_callback(partial(self._ended, key))

    def _ended(self, key: str, task: asyncio.Task[None]) -> None:
        del self._work[key]
        self._cancelled.discard(key)

    # ------------------------------------------------------------------ one batch
    async def _run_batch(self, batch: Json) -> None:
        try:
            reason, problems = await self._outcome(batch)
            try:
                await self._end(batch, reason, problems)
            except RequestError as error:
                if error.code not in FINAL:
                    raise
                await self._end(batch, None, [_told(error.code, error.message)])
        except Exception as error:  # most often the storage's: tried again with the next look
            known = isinstance(error, RequestError)
            log.error("batch %s: %s", batch["id"], error, exc_info=None if known else error)
            await asyncio.sleep(RETRY)

    async def _outcome(self, batch: Json) -> tuple[str | None, list[Json]]:
        """Run the lines. Returns why not all of them were run, and the problems that the batch fails with."""
        if batch["status"] == "finalizing":
            return None, []
        try:
            if batch["status"] == "validating":
                problems = await self._validate(batch)
                if problems:
                    return None, problems
            return await self._run_lines(batch), []
        except RequestError as error:
            if error.code not in FINAL:
                raise
            return None, [_told(error.code, error.message)]
        except Exception:
            log.exception("batch %s failed", batch["id"])
            return None, [_told("internal_error", "internal error")]

    async def _change(self, key: str, only_from: tuple[str, ...], **fields: Any) -> Json | None:
        return await self._storage.run(partial(self._storage.change_batch, key, only_from, **fields))

    def _lines(self, batch: Json) -> Iterator[tuple[int, bytes]]:
        """The input's lines, as `lines_of`. Raises RequestError when the file has gone."""
        try:
            yield from lines_of(self._storage.path(batch["input_file_id"]), self._longest)
        except FileNotFoundError:
            raise file_gone(batch["input_file_id"], "input_file_id") from None

    async def _validate(self, batch: Json) -> list[Json]:
        """What is wrong with lines that are no requests. If nothing is, the batch is in progress."""
        total, errors = await asyncio.to_thread(
            check_lines, self._lines(batch), batch["endpoint"], self._longest
        )
        if errors:
            return errors
        counts = {"total": total, "completed": 0, "failed": 0}
        changes = {"status": "in_progress", "in_progress_at": _now(), "request_counts": counts}
        await self._change(batch["id"], ("validating",), **changes)
        return []

    async def _run_lines(self, batch: Json) -> str | None:
        """Run what has no result yet. Returns the error code of lines that can't be run any more."""
        key = batch["id"]
        done = await self._storage.run(self._storage.done_lines, key)
        lines = self._lines(batch)
        running: set[asyncio.Task[None]] = set()
        broken: list[BaseException] = []

        def ended(task: asyncio.Task[None]) -> None:
            self._slots.release()
            running.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                broken.append(error)

        try:
            while some := await asyncio.to_thread(lambda: list(islice(lines, READ))):
                for number, line in some:
                    if number in done:
                        continue
                    reason = await self._room(batch)
                    if reason is not None:
                        return reason
                    task = asyncio.create_task(self._run_line(batch, number, line))
                    running.add(task)
                    task.add_done_callback(ended)
            while running and not broken:
                await asyncio.wait(running, timeout=POLL / 4)
                reason = self._over(batch) if running else None
                if reason is not None:
                    return reason
            if broken:
                raise broken[0]
            return None
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _room(self, batch: Json) -> str | None:
        """Wait until a line may start. Takes one of the slots, which the line's end gives back. Returns why
        none may start any more."""
        frontend = self._parts.frontend
        while True:
            reason = self._over(batch)
            if reason is not None:
                return reason
            if frontend.num_live < frontend.ready.max_running and not frontend.draining:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL / 4):
                        await self._slots.acquire()
                    return None
            else:
                await asyncio.sleep(0.02)

    def _over(self, batch: Json) -> str | None:
        if batch["id"] in self._cancelled:
            return "batch_cancelled"
        return "batch_expired" if time.time() >= batch["expires_at"] else None

    # ------------------------------------------------------------------ one line
    async def _run_line(self, batch: Json, number: int, line: bytes) -> None:
        request = msgspec.json.decode(line)
        status, body = await self._answer(batch["endpoint"], request["body"], len(line))
        result = _result(request["custom_id"], status, body)
        await self._storage.run(self._storage.add_result, batch["id"], number, status >= 400, result)

    async def _answer(self, endpoint: str, body: Json, size: int) -> tuple[int, Json]:
        """A line's answer and status. One that the server has no room for now is tried until it has."""
        while True:
            try:
                call = await asyncio.to_thread(self._parse[endpoint], body)
                if call.stream:
                    raise RequestError(
                        "stream: a batch is not streamed", code="invalid_value", param="stream"
                    )
                origin = Origin(
                    route=endpoint,
                    body=body,
                    names=call.names,
                    defaults=self._parts.model.defaults,
                    size=size,
                )
                return 200, await complete(call, self._parts, origin, PRIORITY)
            except RequestError as error:
                if error.status not in (429, 503):
                    return error.status, error_body(error)
            except Exception as error:
                fault = internal_error(error, f"of a batch, {uuid.uuid4().hex}")
                return fault.status, error_body(fault)
            await asyncio.sleep(RETRY)

    # ------------------------------------------------------------------ its end
    async def _end(self, batch: Json, reason: str | None, problems: list[Json]) -> None:
        """How the batch ends is written down first: a process that goes on from there ends it likewise."""
        key, now = batch["id"], _now()
        changes: Json = {"status": "finalizing", "finalizing_at": now}
        if problems:
            changes |= {"failed_at": now, "errors": {"object": "list", "data": problems}}
        elif reason == "batch_expired":
            changes["expired_at"] = now
        decided = await self._change(key, LIVE if problems else ("in_progress",), **changes)
        assert decided is not None
        status = "cancelled" if decided["status"] == "cancelling" else "completed"
        status = next((name for name in ("failed", "expired") if decided[f"{name}_at"]), status)
        if status in ("expired", "cancelled"):
            await self._fill(key, f"batch_{status}")
        ended = {"status": status, f"{status}_at": decided[f"{status}_at"] or now}
        await self._storage.run(partial(self._storage.finish_batch, key, LIVE, **ended))

    async def _fill(self, key: str, reason: str) -> None:
        """Lines without a result get one that says why, if the file was found to have lines."""
        batch = await self._storage.run(self._storage.batch, key)
        if batch is None or batch["in_progress_at"] is None:
            return
        done = await self._storage.run(self._storage.done_lines, key)
        message = {
            "batch_expired": "the completion window ended before this request ran",
            "batch_cancelled": "the batch was cancelled before this request ran",
        }[reason]

        def fill() -> None:
            for number, line in self._lines(batch):
                if number not in done:
                    custom_id = msgspec.json.decode(line)["custom_id"]
                    error = {"code": reason, "message": message}
                    result = {"id": _line_id(), "custom_id": custom_id, "response": None, "error": error}
                    self._storage.add_result(key, number, True, msgspec.json.encode(result), bounded=False)

        await self._storage.run(fill)


def _parsers(parts: Parts) -> dict[str, Callable[[Json], Call]]:
    model, frontend = parts.model, parts.frontend
    responses = Responses(parts, keeps=False)
    pooling, hidden = frontend.config.model.pooling, frontend.ready.hidden_size
    parsers: tuple[Callable[[Json], Call], ...] = (
        lambda body: parse_chat(body, model),
        lambda body: parse_completion(body, model),
        lambda body: parse_embeddings(body, model, pooling=pooling, hidden_size=hidden),
        lambda body: responses.parse(body)[0],
    )
    return dict(zip(ENDPOINTS, parsers, strict=True))


def _told(code: str, message: str, param: str | None = None, line: int | None = None) -> Json:
    """One of the errors of a batch."""
    return {"code": code, "message": message, "param": param, "line": line}


def check_lines(lines: Iterator[tuple[int, bytes]], endpoint: str, longest: int) -> tuple[int, list[Json]]:
    """How many requests there are, and what is wrong, at most MAX_ERRORS of it."""
    errors: list[Json] = []
    seen: set[str] = set()
    total = 0
    for number, line in lines:
        total += 1
        problem = _problem(line, endpoint, seen)
        if len(line) > longest:
            problem = "body_too_large", f"the line is longer than {longest} bytes", None
        if total > MAX_LINES:
            problem = "too_many_lines", f"the file has more than {MAX_LINES} lines", None
        if problem is not None:
            code, message, param = problem
            errors.append(_told(code, message, param, number))
        if len(errors) >= MAX_ERRORS or total > MAX_LINES:
            break
    if not total:
        errors.append(_told("empty_file", "the file has no lines"))
    return total, errors


_LINE: Mapping[str, Rule] = {
    "custom_id": Text(512, shortest=1),
    "method": OneOf(("POST",)),
    "url": OneOf(ENDPOINTS),
    "body": Rule(),
}


def _problem(line: bytes, endpoint: str, seen: set[str]) -> tuple[str, str, str | None] | None:
    """What is wrong with a line, as (code, message, field)."""
    try:
        request = msgspec.json.decode(line)
    except (ValueError, RecursionError):
        return "invalid_json", "the line is not valid JSON", None
    if not isinstance(request, dict):
        return "invalid_type", "the line must be a JSON object", None
    try:
        fields = read_fields(_LINE, request)
    except RequestError as error:
        return error.code, error.message, error.param
    missing = next((name for name in _LINE if name not in fields), None)
    if missing is not None:
        return "missing_field", f"{missing} is missing", missing
    if not isinstance(fields["body"], dict):
        return "invalid_type", "body must be an object", "body"
    if fields["url"] != endpoint:
        return "invalid_value", f"url is {fields['url']}, the batch is for {endpoint}", "url"
    if fields["custom_id"] in seen:
        return "duplicate_custom_id", f"custom_id {fields['custom_id'][:80]!r} occurs twice", "custom_id"
    seen.add(fields["custom_id"])
    return None


def _result(custom_id: str, status: int, body: Json) -> bytes:
    key = _line_id()
    response = {"status_code": status, "request_id": key, "body": body}
    return msgspec.json.encode({"id": key, "custom_id": custom_id, "response": response, "error": None})


def _line_id() -> str:
    return f"batch_req_{uuid.uuid4().hex}"


def _now() -> int:
    return int(time.time())
