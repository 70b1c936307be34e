"""Programs on a running server, over HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from trunkline.lang.backends.native import Answer, NativeBackend
from trunkline.lang.global_config import global_config
from trunkline.lang.http import HttpClient


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

    def cache_prefix(self, prefix_str: str) -> None:
        """Compute the KV of a text, so that prompts which begin with it find it."""
        from trunkline.lang.backends.backend import Prompt

        global_config.run(self.commit(Prompt(prefix_str)))
