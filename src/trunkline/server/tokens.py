"""Text to tokens and back."""

from __future__ import annotations

import asyncio
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from trunkline.server.endpoint import Access, Endpoint, Parts
from trunkline.server.fields import DETOKENIZE_FIELDS, TOKENIZE_FIELDS
from trunkline.server.http import json_response, read_body
from trunkline.types import RequestError


def endpoints(parts: Parts) -> list[Endpoint]:
    own = _Tokens(parts)
    return [
        Endpoint(path, ("POST",), handler, Access.USER, fields, summary=summary)
        for name, handler, fields, summary in (
            ("tokenize", own.tokenize, TOKENIZE_FIELDS, "The tokens of a text"),
            ("detokenize", own.detokenize, DETOKENIZE_FIELDS, "The text of tokens"),
        )
        for path in (f"/{name}", f"/v1/{name}")
    ]


class _Tokens:
    def __init__(self, parts: Parts) -> None:
        self._frontend = parts.frontend
        self._model = parts.model

    async def tokenize(self, request: Request) -> Response:
        fields = await read_body(request, TOKENIZE_FIELDS)
        self._model.check_name(fields.get("model"))
        text = fields.get("prompt", fields.get("text"))
        if text is None:
            raise RequestError("prompt is missing", code="missing_field", param="prompt")
        special = fields.get("add_special_tokens", True)
        tokens = await self._model.tokenizer.encode_async(text, add_special_tokens=special)
        limit = self._frontend.ready.max_context
        return json_response({"tokens": tokens, "count": len(tokens), "max_model_len": limit})

    async def detokenize(self, request: Request) -> Response:
        fields = await read_body(request, DETOKENIZE_FIELDS)
        self._model.check_name(fields.get("model"))
        if "tokens" not in fields:
            raise RequestError("tokens is missing", code="missing_field", param="tokens")
        skip = fields.get("skip_special_tokens", True)
        decode = partial(self._model.tokenizer.decode, skip_special_tokens=skip)
        return json_response({"text": await asyncio.to_thread(decode, fields["tokens"])})
