"""The events of a response, made from those of a chat completion."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

Json = dict[str, Any]

# Finish reason -> status; others complete a response.
_STATUS: Mapping[str, str] = {"length": "incomplete", "abort": "cancelled"}


class Narrator:
    """Tells one chat completion as a response. It alone changes the response, which is always as far as the
    events are.

    Each method gives the events that are to be sent next.
    """

    def __init__(self, response: Json) -> None:
        self._response = response
        self._number = 0
        self._item: Json | None = None  # the last of the output, still growing
        self._finish: str | None = None
        self._held: list[Json] = []  # log-probabilities of tokens that have shown no text yet

    def _event(self, kind: str, **fields: Any) -> Json:
        event = {"type": f"response.{kind}", "sequence_number": self._number, **fields}
        self._number += 1
        return event

    def _whole(self, kind: str) -> Json:
        return self._event(kind, response={**self._response, "output": list(self._response["output"])})

    # ------------------------------------------------------------------ the course of a response
    def begin(self) -> Iterator[Json]:
        self._response["status"] = "in_progress"
        yield self._whole("created")
        yield self._whole("in_progress")

    def take(self, event: Json) -> Iterator[Json]:
        """One event of the chat."""
        if event.get("usage") is not None:
            self._response["usage"] = _usage(event["usage"])
        for choice in event["choices"]:
            delta = choice["delta"]
            logprobs = (choice.get("logprobs") or {}).get("content", [])
            if delta.get("reasoning_content"):
                yield from self._text("reasoning", delta["reasoning_content"], [])
            self._held += logprobs
            if delta.get("content"):
                held, self._held = self._held, []
                yield from self._text("message", delta["content"], held)
            if delta.get("tool_calls"):
                self._held = []  # they were the call's
            for call in delta.get("tool_calls", ()):
                yield from self._call(call)
            self._finish = choice["finish_reason"] or self._finish

    def end(self) -> Iterator[Json]:
        """The chat is over."""
        status = _STATUS.get(self._finish or "", "completed")
        yield from self._close("completed" if status == "completed" else "incomplete")
        self._response |= {"status": status, "completed_at": int(time.time())}
        if status == "incomplete":
            self._response["incomplete_details"] = {"reason": "max_output_tokens"}
        # Clients know no event for a cancelled one: it ends as incomplete, and its status says why.
        yield self._whole("completed" if status == "completed" else "incomplete")

    def fail(self, message: str, code: str) -> Iterator[Json]:
        """It broke off."""
        yield from self._close("incomplete")
        self._response |= {"status": "failed", "error": {"code": code, "message": message}}
        yield self._whole("failed")

    def leave(self) -> None:
        """Nobody listens any more: what has not ended is cancelled."""
        if self._response["status"] == "in_progress":
            self._response["status"] = "cancelled"

    # ------------------------------------------------------------------ items
    def _open(self, item: Json) -> Iterator[Json]:
        yield from self._close("completed")
        self._item = item
        self._response["output"].append(item)
        yield self._event("output_item.added", output_index=self._at, item=_copy(item))

    @property
    def _at(self) -> int:
        return len(self._response["output"]) - 1

    def _where(self) -> Json:
        assert self._item is not None
        return {"item_id": self._item["id"], "output_index": self._at}

    def _text(self, kind: str, text: str, logprobs: list[Json]) -> Iterator[Json]:
        if self._item is None or self._item["type"] != kind:
            yield from self._open(_new_text(kind))
            assert self._item is not None
            part = _new_part(kind)
            self._item["content"].append(part)
            yield self._event("content_part.added", **self._where(), content_index=0, part=_copy(part))
        assert self._item is not None
        part = self._item["content"][0]
        part["text"] += text
        fields = {**self._where(), "content_index": 0, "delta": text}
        if kind == "message":
            part["logprobs"] += logprobs
            yield self._event("output_text.delta", **fields, logprobs=logprobs)
        else:
            yield self._event("reasoning_text.delta", **fields)

    def _call(self, call: Json) -> Iterator[Json]:
        function = call.get("function", {})
        if "id" in call:
            item = {"type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "call_id": call["id"]}
            item |= {"name": function["name"], "arguments": "", "status": "in_progress"}
            yield from self._open(item)
        assert self._item is not None
        if function.get("arguments"):
            self._item["arguments"] += function["arguments"]
            yield self._event("function_call_arguments.delta", **self._where(), delta=function["arguments"])

    def _close(self, status: str) -> Iterator[Json]:
        """End the growing item, if there is one."""
        item = self._item
        if item is None:
            return
        where = self._where()
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("function_call_arguments.done", **where, **done)
        else:
            part, at = item["content"][0], {**where, "content_index": 0}
            if item["type"] == "message":
                yield self._event(
                    "output_text.done", **at, text=part["text"], logprobs=list(part["logprobs"])
                )
            else:
                yield self._event("reasoning_text.done", **at, text=part["text"])
            yield self._event("content_part.done", **at, part=_copy(part))
        item["status"] = status
        yield self._event("output_item.done", output_index=self._at, item=_copy(item))
        self._item = None


def _new_text(kind: str) -> Json:
    if kind == "reasoning":
        own = {"id": f"rs_{uuid.uuid4().hex}", "summary": []}
    else:
        own = {"id": f"msg_{uuid.uuid4().hex}", "role": "assistant"}
    return {"type": kind, **own, "content": [], "status": "in_progress"}


def _new_part(kind: str) -> Json:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": ""}
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def _copy(value: Json) -> Json:
    """As it is now: what was sent does not change any more."""
    return {name: list(entry) if isinstance(entry, list) else entry for name, entry in value.items()}


def _usage(usage: Json) -> Json:
    details = usage.get("completion_tokens_details") or {}
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": details.get("reasoning_tokens", 0)},
        "total_tokens": usage["total_tokens"],
    }
