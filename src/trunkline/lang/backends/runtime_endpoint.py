"""Programs on a running server, over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
import weakref
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from trunkline.http import HttpClient
from trunkline.lang.backends.backend import TokenPath
from trunkline.lang.backends.native import Answer, NativeBackend
from trunkline.lang.global_config import global_config
from trunkline.types import RequestError

SESSION_FROM = 1024  # tokens of a prompt from which on a session saves more than it costs
_LOST = frozenset(
    {"unknown_session", "unknown_session_rid", "session_full", "session_busy", "too_many_sessions"}
)


class _Session:
    """Closed on the server when no program can go on from it any more."""

    def __init__(self, http: HttpClient, name: str) -> None:
        self.name = name
        weakref.finalize(self, _close_session, http, name).atexit = False


@dataclass(frozen=True)
class _Place:
    session: _Session
    rid: str


class RuntimeEndpoint(NativeBackend):
    """The server at `base_url`. Raises OSError or RequestError when it can't be reached or refuses the key.

    `verify`: False trusts any certificate, a path names the file of authorities to trust.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        verify: bool | str | None = None,
        chat_template_name: str | None = None,
    ) -> None:
        super().__init__(chat_template_name)
        self.base_url = base_url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = HttpClient(self.base_url, headers, verify)
        self._has_sessions = True
        self.model_info: dict[str, Any] = global_config.run(self._http.json("GET", "/get_model_info"))
        self.takes_images = bool(self.model_info.get("has_image_understanding"))

    def get_model_name(self) -> str:
        return self.model_path

    @property
    def model_path(self) -> str:
        return str(self.model_info["model_path"])

    @property
    def tokenizer_path(self) -> str:
        return str(self.model_info.get("tokenizer_path") or self.model_path)

    async def call(self, fields: dict[str, Any]) -> Any:
        return await self._http.json("POST", "/generate", fields)

    async def call_from(self, path: TokenPath, fields: dict[str, Any]) -> tuple[Any, object]:
        """Long prompts go on from what a session has: only new tokens are sent. What is not there any more,
        or has no room, is sent whole."""
        ids = fields.get("input_ids", ())
        if not self._has_sessions or len(ids) < SESSION_FROM or fields["sampling_params"]["n"] != 1:
            return await self.call(fields), None
        place, kept = path.place, len(path.ids)
        try:
            if isinstance(place, _Place) and ids[:kept] == path.ids:
                session, ids = place.session, ids[kept:]
                where = {"id": session.name, "rid": place.rid, "offset": kept}
            else:
                session = await self._open_session()
                where = {"id": session.name}
            rid = uuid.uuid4().hex
            short = {name: value for name, value in fields.items() if name != "input_ids"}
            short |= {"input_ids": ids} if ids else {"text": ""}
            return await self.call({**short, "rid": rid, "session_params": where}), _Place(session, rid)
        except RequestError as error:
            if error.code not in _LOST:
                raise
            return await self.call(fields), None

    async def _open_session(self) -> _Session:
        try:
            return _Session(self._http, await self._http.json("POST", "/open_session", {}))
        except RequestError as error:
            self._has_sessions = error.status == 429  # else a server without them: not asked again
            raise RequestError(error.message, code="too_many_sessions") from error

    def stream(self, fields: dict[str, Any]) -> AsyncGenerator[Answer, None]:
        return self._http.events("/generate", {**fields, "stream": True})

    async def flush(self) -> None:
        await self._http.json("POST", "/flush_cache?timeout=30")

    async def server_info(self) -> dict[str, Any]:
        info: dict[str, Any] = await self._http.json("GET", "/get_server_info")
        return info

    # ------------------------------------------------------------------ for callers without a program
    def flush_cache(self) -> None:
        """Empty the prefix cache. Raises RequestError while requests are running."""
        global_config.run(self.flush())

    def get_server_info(self) -> dict[str, Any]:
        info: dict[str, Any] = global_config.run(self.server_info())
        return info

    def start_profile(self, **fields: Any) -> Any:
        """POST /start_profile; `fields` are its fields."""
        return global_config.run(self._http.json("POST", "/start_profile", fields))

    def stop_profile(self) -> Any:
        return global_config.run(self._http.json("POST", "/stop_profile"))

    def encode(self, prompt: str | list[str]) -> Any:
        """The answer of POST /encode: embeddings."""
        return global_config.run(self._http.json("POST", "/encode", {"text": prompt}))

    def cache_prefix(self, prefix_str: str) -> None:
        """Compute the KV of a text, so that prompts which begin with it find it."""
        from trunkline.lang.backends.backend import Prompt

        global_config.run(self.commit(Prompt(prefix_str)))


def _close_session(http: HttpClient, name: str) -> None:
    async def close() -> None:
        with contextlib.suppress(RequestError, OSError):  # it may be closed, the server may be gone
            await http.json("POST", "/close_session", {"session_id": name})

    with contextlib.suppress(RuntimeError):  # no loop any more
        asyncio.run_coroutine_threadsafe(close(), global_config.loop())
