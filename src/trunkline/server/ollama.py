"""Ollama's interface: /api/chat, /api/generate, and what it says of models."""

from __future__ import annotations

import datetime
import hashlib
import json
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from trunkline import __version__
from trunkline.engine.constraint import Constraint, ResponseFormat
from trunkline.engine.fields import (
    INT32_MAX,
    SAMPLING_FIELDS,
    Flag,
    Items,
    Number,
    Object,
    OneOf,
    Rule,
    Text,
    Unsupported,
    read_fields,
    wrong_type,
)
from trunkline.engine.frontend import Chunk, GenerationRequest, Prepared
from trunkline.engine.native import request_ids
from trunkline.engine.usage import Usage
from trunkline.server.call import Json, ServedModel
from trunkline.server.endpoint import Access, Endpoint, Handler, Parts
from trunkline.server.fields import ANY_LENGTH, MAX_MESSAGES, MAX_TOOLS, TOOL
from trunkline.server.framing import OLLAMA
from trunkline.server.http import json_response, read_body
from trunkline.server.parts import OutputParts, Part, Thought
from trunkline.server.respond import generation
from trunkline.server.tools.parser import CallArguments, CallEnd, CallStart
from trunkline.server.translated import check_not_aborted, missing, parse_translated, thinking_kwargs
from trunkline.types import RequestError

_NO_IMAGES = Unsupported(([],), "this server takes text only")
_FIXED = "it is fixed when the server starts"


@dataclass(frozen=True)
class Format(Rule):
    """ "json", or a JSON schema. Reads as a chat's response_format."""

    def read(self, value: Any, name: str) -> Json | None:
        if value == "":
            return None
        if value == "json":
            return {"type": "json_object"}
        if not isinstance(value, dict):
            raise wrong_type(name, '"json" or a JSON schema', value)
        return {"type": "json_schema", "json_schema": {"name": "format", "schema": value}}


@dataclass(frozen=True)
class Think(Rule):
    """true, false, or how much."""

    def read(self, value: Any, name: str) -> bool | str:
        if isinstance(value, str):
            return OneOf(("low", "medium", "high", "max")).read(value, name)
        return Flag().read(value, name)


@dataclass(frozen=True)
class KeepAlive(Rule):
    """Models stay loaded as long as the server runs, so this changes nothing, by definition."""

    def read(self, value: Any, name: str) -> Any:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise wrong_type(name, "a duration", value)
        return value


# Name here -> name of a chat completion's field.
_OPTIONS: Mapping[str, str] = {
    **{
        name: name
        for name in (
            "temperature", "top_p", "top_k", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty"
        )
    },
    "num_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
}  # fmt: skip
OPTIONS: Mapping[str, Rule] = {
    **{name: SAMPLING_FIELDS[name] for name in ("temperature", "top_p", "min_p", "stop")},
    **{name: SAMPLING_FIELDS[name] for name in ("presence_penalty", "frequency_penalty")},
    "top_k": Number(0, INT32_MAX, integer=True, also=(-1,)),
    "seed": SAMPLING_FIELDS["sampling_seed"],
    "num_predict": Number(0, INT32_MAX, integer=True, also=(-1, -2)),
    "repeat_penalty": SAMPLING_FIELDS["repetition_penalty"],
    "num_ctx": Number(1, INT32_MAX, integer=True),
    **dict.fromkeys(("mirostat", "mirostat_tau", "mirostat_eta", "typical_p", "tfs_z"), Unsupported()),
    **dict.fromkeys(("repeat_last_n", "penalize_newline", "num_keep", "draft_num_predict"), Unsupported()),
    **dict.fromkeys(("num_batch", "num_gpu", "main_gpu", "num_thread", "numa"), Unsupported((), _FIXED)),
    **dict.fromkeys(("low_vram", "f16_kv", "vocab_only", "use_mmap", "use_mlock"), Unsupported((), _FIXED)),
}
_COMMON: Mapping[str, Rule] = {
    "model": Text(),
    "stream": Flag(),
    "format": Format(),
    "options": Object(OPTIONS),
    "keep_alive": KeepAlive(),
    "think": Think(),
    "logprobs": Unsupported((False,), "use /v1/chat/completions"),
    "top_logprobs": Unsupported((0,), "use /v1/chat/completions"),
    "truncate": Unsupported((False,), "a prompt that is too long is refused"),
    "shift": Unsupported((False,), "an output ends where the context does"),
}
_CALL = Object(
    {
        "id": Text(),
        "type": OneOf(("function",)),
        "function": Object(
            {"name": Text(), "arguments": Object(), "index": Number(0, integer=True), "description": Text()}
        ),
    }
)
_MESSAGE = Object(
    {
        "role": OneOf(("system", "user", "assistant", "tool")),
        "content": Text(ANY_LENGTH),
        "thinking": Text(ANY_LENGTH),
        "images": _NO_IMAGES,
        "tool_calls": Items(_CALL, MAX_TOOLS),
        "tool_name": Text(),
        "tool_call_id": Text(),
    }
)
CHAT_FIELDS: Mapping[str, Rule] = {
    **_COMMON,
    "messages": Items(_MESSAGE, MAX_MESSAGES),
    "tools": Items(TOOL, MAX_TOOLS),
}
GENERATE_FIELDS: Mapping[str, Rule] = {
    **_COMMON,
    "prompt": Text(ANY_LENGTH),
    "system": Text(ANY_LENGTH),
    "raw": Flag(),
    "suffix": Unsupported(("",)),
    "images": _NO_IMAGES,
    "template": Unsupported(("",), "start the server with --chat-template"),
    "context": Unsupported(([],), "use /api/chat"),
}
SHOW_FIELDS: Mapping[str, Rule] = {"model": Text(), "name": Text(), "verbose": Flag()}

_RENAMES = (
    *((name, f"options.{own}") for own, name in _OPTIONS.items()),
    (r"chat_template_kwargs\..*|reasoning_effort", "think"),
    (r"response_format.*", "format"),
    (r"continue_final_message", "messages"),
)


def endpoints(parts: Parts) -> list[Endpoint]:
    own = _Models(parts)
    chat = partial(parse_chat, most=parts.frontend.ready.max_context)
    generate = partial(parse_generate, most=parts.frontend.ready.max_context)
    rows: tuple[tuple[str, str, Handler, Mapping[str, Rule] | None, str], ...] = (
        ("chat", "POST", generation(chat, parts, OLLAMA), CHAT_FIELDS, "The answer in a chat"),
        ("generate", "POST", own.or_loaded(generation(generate, parts, OLLAMA)), GENERATE_FIELDS,
         "What follows a prompt"),
        ("tags", "GET", own.tags, None, "The models"),
        ("ps", "GET", own.running, None, "The models that are loaded"),
        ("show", "POST", own.show, SHOW_FIELDS, "Facts of a model"),
        ("version", "GET", own.version, None, "The server's version"),
    )  # fmt: skip
    return [
        Endpoint(
            f"/api/{name}",
            (method,),
            handler,
            Access.USER,
            fields,
            summary=f"{summary}, in Ollama's interface",
            envelope=OLLAMA.envelope,
        )
        for name, method, handler, fields, summary in rows
    ]


# ---------------------------------------------------------------------- requests
def parse_chat(body: Mapping[str, Any], model: ServedModel, *, most: int) -> OllamaCall:
    """Check a request and render its prompt. `most`: tokens of a context. Raises RequestError."""
    fields = read_fields(CHAT_FIELDS, body)
    missing(fields, "messages")
    messages = [_message(message, f"messages[{i}]") for i, message in enumerate(fields["messages"])]
    if not messages:
        raise RequestError("messages is empty: send at least one", code="missing_field", param="messages")
    return _chat_call(fields, messages, model, most, "message")


def parse_generate(body: Mapping[str, Any], model: ServedModel, *, most: int) -> OllamaCall:
    """As `parse_chat`, for one prompt; `raw`: without the chat template."""
    fields = read_fields(GENERATE_FIELDS, body)
    missing(fields, "prompt")
    if not fields.get("raw"):
        system = [{"role": "system", "content": fields["system"]}] if fields.get("system") else []
        messages = [*system, {"role": "user", "content": fields["prompt"]}]
        return _chat_call(fields, messages, model, most, "response")
    for name in ("system", "think"):
        if fields.get(name):
            raise RequestError(
                f"{name} is shown by the chat template, which raw: true leaves out",
                code="invalid_value",
                param=name,
            )
    model.check_name(_name(fields))
    given = _options(fields, most)
    request = GenerationRequest(
        rid=request_ids({}, "ollama", 1)[0],
        prompt=fields["prompt"],
        params=model.sampling_params(given, max_new_tokens=None),
        constraint=_constraint(fields),
    )
    stream = fields.get("stream", True)
    return OllamaCall([request], stream, model, lambda: OutputParts(None), "response", _names({}))


def _constraint(fields: Mapping[str, Any]) -> Constraint | None:
    form = fields.get("format")
    return None if form is None else ResponseFormat().read(form, "response_format")


def _chat_call(
    fields: Mapping[str, Any], messages: list[Json], model: ServedModel, most: int, kind: str
) -> OllamaCall:
    think = fields.get("think")
    chat = {
        "model": _name(fields),
        "messages": messages,
        "tools": fields.get("tools") or None,
        "response_format": fields.get("format"),
        "chat_template_kwargs": thinking_kwargs(model, None if think is None else bool(think)),
        "reasoning_effort": think if isinstance(think, str) else None,
        **_options(fields, most),
    }
    call = parse_translated(chat, model, _RENAMES)
    return OllamaCall(call.requests, fields.get("stream", True), model, call.parts, kind, _names(call.names))


def _names(names: Mapping[str, str]) -> Json:
    own = {"response_format.json_schema.schema": "format", "max_new_tokens": "options.num_predict"}
    return {**names, **own}


def _name(fields: Mapping[str, Any]) -> str | None:
    """The model's name; a tag that says no more than "the latest" goes."""
    name: str | None = fields.get("model", fields.get("name"))
    return None if name is None else name.removesuffix(":latest")


def _options(fields: Mapping[str, Any], most: int) -> Json:
    options = dict(fields.get("options", {}))
    context = options.pop("num_ctx", 0)
    if context > most:
        raise RequestError(
            f"options.num_ctx is {context}; the context of this server is {most} tokens (--context-length)",
            code="out_of_range",
            param="options.num_ctx",
        )
    if options.get("num_predict", 0) < 0:  # as much as there is room for
        del options["num_predict"]
    if options.get("top_k") == 0:
        options["top_k"] = -1
    return {_OPTIONS[name]: value for name, value in options.items()}


def _message(message: Json, name: str) -> Json:
    shown: Json = {key: message[key] for key in ("role", "content", "tool_call_id") if key in message}
    if message.get("role") == "assistant" and "content" not in shown:
        shown["content"] = ""
    if "thinking" in message:
        shown["reasoning_content"] = message["thinking"]
    if "tool_name" in message:
        shown["name"] = message["tool_name"]
    if "tool_calls" in message:
        calls = enumerate(message["tool_calls"])
        shown["tool_calls"] = [_function(call, f"{name}.tool_calls[{i}]") for i, call in calls]
    return shown


def _function(call: Json, name: str) -> Json:
    function = call.get("function", {})
    if "name" not in function:
        raise RequestError(
            f"{name}.function.name is missing", code="missing_field", param=f"{name}.function.name"
        )
    arguments = json.dumps(function.get("arguments", {}), ensure_ascii=False)
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


# ---------------------------------------------------------------------- responses
@dataclass(frozen=True)
class OllamaCall:
    """A parsed request. `kind`: the field that holds the answer, "message" or "response"."""

    requests: list[GenerationRequest]
    stream: bool
    model: ServedModel
    parts: Callable[[], OutputParts]
    kind: str
    names: Mapping[str, str]

    async def events(
        self, batch: Sequence[Prepared], chunks: AsyncGenerator[Chunk, None]
    ) -> AsyncGenerator[Json, None]:
        began = time.monotonic_ns()
        first = 0
        usage, parts, writer = Usage(1), self.parts(), _Writer(self.kind)
        async with aclosing(chunks):
            async for chunk in chunks:
                usage.add(chunk)
                first = first or time.monotonic_ns()
                for part in parts.feed(chunk):
                    for piece in writer.add(part):
                        yield self._line(piece, done=False)
                if chunk.finish is not None:
                    check_not_aborted(chunk.finish)
                    ended = time.monotonic_ns()
                    yield self._line(writer.empty(), done=True) | {
                        "done_reason": chunk.finish.kind,
                        "total_duration": ended - began,
                        "load_duration": 0,
                        "prompt_eval_count": usage.prompt_tokens,
                        "prompt_eval_duration": first - began,
                        "eval_count": usage.completion_tokens,
                        "eval_duration": ended - first,
                    }

    def _line(self, piece: Json, *, done: bool) -> Json:
        return {"model": self.model.name, "created_at": _now(), **piece, "done": done}

    def join(self, events: Sequence[Json]) -> Json:
        whole = dict(events[-1])
        if self.kind == "message":
            message: Json = {"role": "assistant", "content": ""}
            whole["message"] = message
            for event in events:
                _join(message, event["message"])
        else:
            pieces: Json = {"response": ""}
            for event in events:
                _join(pieces, {name: event[name] for name in ("response", "thinking") if name in event})
            whole |= pieces
        return whole


def _join(whole: Json, piece: Json) -> None:
    for name, value in piece.items():
        if name == "tool_calls":
            whole.setdefault(name, []).extend(value)
        elif name != "role":
            whole[name] = whole.get(name, "") + value


class _Writer:
    """Parts of a completion as pieces of answers. A call comes whole, with arguments as an object."""

    def __init__(self, kind: str) -> None:
        self._message = kind == "message"
        self._name = ""
        self._arguments: list[str] = []

    def empty(self) -> Json:
        return self._text("")

    def add(self, part: Part) -> list[Json]:
        match part:
            case str():
                return [self._text(part)]
            case Thought(text):
                piece = {"thinking": text}
                if self._message:
                    return [{"message": {"role": "assistant", "content": "", **piece}}]
                return [{"response": "", **piece}]
            case CallStart(name):
                self._name = name
            case CallArguments(text):
                self._arguments.append(text)
            case CallEnd():
                return [self._call()]
        return []

    def _text(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text}} if self._message else {"response": text}

    def _call(self) -> Json:
        text = "".join(self._arguments)
        self._arguments.clear()
        try:
            arguments = json.loads(text)
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):  # a call that was cut off can't be shown as one
            return self._text(f"{self._name}({text}")
        call = {"function": {"name": self._name, "arguments": arguments}}
        return {"message": {"role": "assistant", "content": "", "tool_calls": [call]}}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")


# ---------------------------------------------------------------------- models
class _Models:
    """What is said of the one model that is served."""

    def __init__(self, parts: Parts) -> None:
        self._frontend = parts.frontend
        self._model = parts.model

    def or_loaded(self, handler: Handler) -> Handler:
        """Without a prompt, a client asks for the model to be loaded, which it is."""

        async def handle(request: Request) -> ASGIApp:
            body = await request.body() if int(request.headers.get("content-length", 1 << 20)) < 4096 else b""
            try:
                fields = json.loads(body or b"{}")
            except ValueError:
                fields = {}
            if isinstance(fields, dict) and fields.keys() <= {"model", "keep_alive", "stream"} and fields:
                checked = read_fields(GENERATE_FIELDS, fields)
                self._model.check_name(_name(checked))
                done = {"response": "", "done": True, "done_reason": "load"}
                return json_response({"model": self._model.name, "created_at": _now(), **done})
            return await handler(request)

        return handle

    async def version(self, request: Request) -> Response:
        return json_response({"version": __version__})

    async def tags(self, request: Request) -> Response:
        return json_response({"models": [self._card()]})

    async def running(self, request: Request) -> Response:
        never = "9999-12-31T23:59:59Z"
        config = self._frontend.config.model
        more = {"expires_at": never, "size_vram": self._size() if config.device == "cuda" else 0}
        return json_response({"models": [{**self._card(), **more}]})

    async def show(self, request: Request) -> Response:
        fields = await read_body(request, SHOW_FIELDS)
        self._model.check_name(_name(fields))
        template = self._model.template
        can = ["completion"]
        can += ["tools"] if template is not None and template.shows_tools and self._model.tools else []
        can += ["thinking"] if self._model.reasoning else []
        lines = [f"{name} {value}" for name, value in self._model.defaults.items()]
        return json_response(
            {
                "parameters": "\n".join(lines),
                "template": "" if template is None else template.source,
                "details": self._details(),
                "model_info": {
                    "general.architecture": self._model.architecture,
                    "general.name": self._model.name,
                    f"{self._model.architecture}.context_length": self._frontend.ready.max_context,
                },
                "capabilities": can,
                "modified_at": self._modified(),
            }
        )

    def _card(self) -> Json:
        return {
            "name": self._model.name,
            "model": self._model.name,
            "modified_at": self._modified(),
            "size": self._size(),
            "digest": self._digest(),
            "details": self._details(),
        }

    def _details(self) -> Json:
        config = self._frontend.config.model
        return {
            "parent_model": "",
            "format": "safetensors",
            "family": self._model.architecture,
            "families": [self._model.architecture],
            "parameter_size": "",
            "quantization_level": config.dtype if config.quantization == "plain" else config.quantization,
        }

    def _files(self) -> list[Path]:
        return sorted(Path(self._frontend.config.model.path).glob("*.safetensors"))

    def _size(self) -> int:
        return sum(file.stat().st_size for file in self._files())

    def _modified(self) -> str:
        times = [file.stat().st_mtime for file in self._files()]
        stamp = datetime.datetime.fromtimestamp(max(times, default=self._model.created), datetime.UTC)
        return stamp.isoformat().replace("+00:00", "Z")

    def _digest(self) -> str:
        """Of names, sizes and times of the weight files: it changes when they do."""
        facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self._files()]
        return hashlib.sha256(repr((facts, self._model.weight_version)).encode()).hexdigest()
