"""The playground: one page and its parts, sent from memory.

What it shows comes from the routes of the server, so the page is open to everybody and its data are not."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

from trunkline import __version__
from trunkline.engine.fields import SAMPLING_FIELDS, Number, Rule, Text, read_fields
from trunkline.server.call import Json
from trunkline.server.chat import parse_chat
from trunkline.server.endpoint import Access, Endpoint, Parts
from trunkline.server.fields import ANY_LENGTH, CHAT_FIELDS
from trunkline.server.http import json_response, read_json
from trunkline.types import RequestError, SamplingParams

PAGE = "index.html"
KINDS: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing from elsewhere, no code in the page itself, no frames: what a model writes can't become a program.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
HEADERS: Mapping[str, str] = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # asked for anew each time, by its tag: a new version shows at once
    "vary": "accept",
}


TEXT_FIELDS: Mapping[str, Rule] = {"text": Text(ANY_LENGTH)}
PROMPT_FIELDS: Mapping[str, Rule] = {**CHAT_FIELDS, **TEXT_FIELDS}


@dataclass(frozen=True)
class File:
    """One file of the page, in memory."""

    data: bytes
    kind: str
    tag: str


def endpoints(parts: Parts) -> list[Endpoint]:
    own = _Page(parts)
    get = ("GET",)
    return [
        Endpoint("/", get, own.index, Access.OPEN, summary="The playground; what this server is, as JSON"),
        Endpoint("/playground/{name}", get, own.part, Access.OPEN, summary="Parts of the playground's page"),
        Endpoint(
            "/v1/playground/about", get, own.about, Access.USER, summary="What the playground offers here"
        ),
        Endpoint(
            "/v1/playground/prompt",
            ("POST",),
            own.prompt,
            Access.USER,
            fields=PROMPT_FIELDS,
            summary="The prompt that a chat request or a text makes, token by token",
        ),
    ]


def read_files() -> dict[str, File]:
    """All files of the page, by name."""
    found = {}
    for entry in files("trunkline.server").joinpath("playground").iterdir():
        kind = KINDS.get(entry.name[entry.name.rfind(".") :])
        if kind is not None:
            data = entry.read_bytes()
            found[entry.name] = File(data, kind, f'"{hashlib.sha256(data).hexdigest()[:20]}"')
    return found


class _Page:
    def __init__(self, parts: Parts) -> None:
        self._frontend = parts.frontend
        self._model = parts.model
        self._files = read_files()

    async def index(self, request: Request) -> Response:
        """The page for browsers; an index for programs, which do not ask for HTML."""
        if "text/html" in request.headers.get("accept", ""):
            return self._send(PAGE, request)
        index = {"server": "trunkline", "version": __version__, "api": "/v1", "health": "/health"}
        return json_response({**index, "models": "/v1/models"}, headers={"vary": "accept"})

    async def part(self, request: Request) -> Response:
        return self._send(request.path_params["name"], request)

    def _send(self, name: str, request: Request) -> Response:
        file = self._files.get(name)
        if file is None:
            raise RequestError(f"the playground has no file {name[:80]!r}", code="not_found", status=404)
        headers = {**HEADERS, "etag": file.tag}
        if request.headers.get("if-none-match") == file.tag:
            return Response(None, 304, headers)
        return Response(file.data, 200, headers, media_type=file.kind)

    async def about(self, request: Request) -> Response:
        """What the page needs to know: the model, and each parameter's default and bounds."""
        template, config = self._model.template, self._frontend.config
        return json_response(
            {
                "version": __version__,
                "model": self._model.name,
                "max_context": self._frontend.ready.max_context,
                "max_running": self._frontend.ready.max_running,
                "page_size": self._frontend.ready.page_size,
                "chat": template is not None,
                "tools": template is not None and template.shows_tools,
                "thinking": template is not None and "enable_thinking" in template.variables,
                "grammar": config.grammar.backend != "none",
                "prefix_cache": config.cache.prefix_cache,
                "admin_key": config.server.admin_api_key is not None,
                "parameters": self._parameters(),
            }
        )

    def _parameters(self) -> Json:
        """`default` of the chat, which the model has a say in, and `raw` of /generate, which it has not."""
        defaults, raw = self._model.sampling_params({}, max_new_tokens=None), SamplingParams()
        shown: Json = {}
        for name, rule in SAMPLING_FIELDS.items():
            if isinstance(rule, Number):
                bounds = [bound if abs(bound) < 1e9 else None for bound in (rule.low, rule.high)]
                low, high = bounds
                both = {"default": getattr(defaults, name), "raw": getattr(raw, name)}
                shown[name] = {**both, "low": low, "high": high}
        return shown

    async def prompt(self, request: Request) -> Response:
        """[token id, text] of each token that the model reads. A part of a character shows as U+FFFD."""
        body = await read_json(request)
        if "text" in body:
            text, special = read_fields(TEXT_FIELDS, body).get("text", ""), True
        else:
            text, special = parse_chat(body, self._model).requests[0].prompt, False
        tokenizer = self._model.tokenizer
        token_ids = await tokenizer.encode_async(text, add_special_tokens=special)
        return json_response({"tokens": [[token, tokenizer.token_text(token)] for token in token_ids]})
