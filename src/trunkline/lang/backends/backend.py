"""What a program's runtime asks of a backend."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from trunkline.lang.chat_template import ChatTemplate, Message, get_chat_template
from trunkline.lang.choices import ChoicesDecision
from trunkline.lang.ir import Sampling, Select
from trunkline.types import RequestError


@dataclass(frozen=True)
class TokenPath:
    """The first `length` characters of a state's text as the token ids that the engine has in its prefix
    tree.

    `place`: where a backend that keeps tokens itself has them. Never changed in place: forks share it.
    """

    ids: Sequence[int] = ()
    length: int = 0
    place: object = None


@dataclass
class Prompt:
    """What a state has said before a call. A backend may replace `path` after a generation."""

    text: str
    messages: list[Message] = field(default_factory=list)  # closed turns
    images: list[str] = field(default_factory=list)  # data URLs
    role: str | None = None
    turn: str = ""  # text of the open turn
    path: TokenPath = TokenPath()


# New text, or the whole texts of n > 1 completions; and what is known about the call so far.
Piece = tuple[str | list[str], dict[str, Any]]


class Backend:
    """Base of all backends. Its coroutines run on the programs' event loop."""

    is_chat_model = False  # takes messages; `num_api_spec_tokens` makes one call per assistant turn
    takes_images = False

    def get_chat_template(self) -> ChatTemplate:
        return get_chat_template("default")

    def generate(self, prompt: Prompt, sampling: Sampling, stream: bool) -> AsyncGenerator[Piece, None]:
        """One Piece; with `stream`, a Piece for each new text. Closing the generator aborts the call."""
        raise self.unsupported("gen")

    async def select(self, prompt: Prompt, select: Select) -> ChoicesDecision:
        raise self.unsupported("select")

    async def commit(self, prompt: Prompt) -> None:
        """Have the prompt in the prefix cache, if this backend has one to speak of."""

    async def flush(self) -> None:
        raise self.unsupported("flush_cache")

    async def server_info(self) -> dict[str, Any]:
        raise self.unsupported("get_server_info")

    def unsupported(self, what: str) -> RequestError:
        return RequestError(
            f"{type(self).__name__} does not support {what}", code="unsupported_field", param=what
        )
