"""Programs on an engine in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from trunkline.lang.backends.backend import Prompt
from trunkline.lang.backends.native import Answer, NativeBackend
from trunkline.text.tokenizer import Tokenizer
from trunkline.types import RequestError

if TYPE_CHECKING:
    from trunkline.engine.offline import Engine


class EngineBackend(NativeBackend):
    """Made of an `Engine` by itself: pass the engine wherever a backend is asked for."""

    def __init__(self, engine: Engine, chat_template_name: str | None = None) -> None:
        super().__init__(chat_template_name)
        self.engine = engine
        self.tokenizer: Tokenizer | None = engine.tokenizer

    @property
    def model_path(self) -> str:
        return self.engine.config.model.path

    async def call(self, fields: dict[str, Any]) -> Any:
        return await self.engine.async_generate(**_arguments(fields))

    async def stream(self, fields: dict[str, Any]) -> AsyncGenerator[Answer, None]:
        answers = await self.engine.async_generate(**_arguments(fields), stream=True)
        assert not isinstance(answers, dict | list)
        async for answer in answers:
            yield answer

    async def commit(self, prompt: Prompt) -> None:
        if self.engine.config.cache.prefix_cache:
            await super().commit(prompt)

    async def flush(self) -> None:
        if not await asyncio.to_thread(self.engine.flush_cache):
            raise RequestError("the cache was not flushed: requests are running", code="engine_busy")

    async def server_info(self) -> dict[str, Any]:
        return await asyncio.to_thread(self.engine.get_server_info)


def _arguments(fields: dict[str, Any]) -> dict[str, Any]:
    named = dict(fields)
    if "text" in named:
        named["prompt"] = named.pop("text")
    return named
