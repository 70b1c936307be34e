"""What a program has said so far: its text, the same as messages, and the role and scopes that are open."""

from __future__ import annotations

import base64
import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trunkline.lang.chat_template import ChatTemplate, Message


@dataclass
class Transcript:
    """Pure bookkeeping, without a model. `images` holds data URLs, in the order of their marks in `text`."""

    template: ChatTemplate
    text: str = ""
    messages: list[Message] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    role: str | None = None
    turn_start: int = 0  # where the text of the open turn begins
    turn_images: list[str] = field(default_factory=list)
    scopes: dict[str, int] = field(default_factory=dict)

    def branch(self) -> Transcript:
        """An independent copy."""
        twin = copy.copy(self)
        for name in ("messages", "images", "turn_images"):
            setattr(twin, name, list(getattr(self, name)))
        twin.scopes = dict(self.scopes)
        return twin

    @property
    def turn_text(self) -> str:
        """What the open turn says so far."""
        return self.text[self.turn_start :]

    def role_begin(self, role: str) -> None:
        """Raises ValueError inside another role. The template's default system prompt comes first of all."""
        if self.role is not None:
            raise ValueError(f"role {role!r} begins inside role {self.role!r}: roles can't be nested")
        if not self.messages and role != "system" and self.template.default_system_prompt:
            self.role_begin("system")
            self.text += self.template.default_system_prompt
            self.role_end("system")
        self.text += self.template.get_prefix_and_suffix(role, self.messages)[0]
        self.role, self.turn_start = role, len(self.text)

    def role_end(self, role: str) -> None:
        """Raises ValueError unless `role` is open."""
        if self.role != role:
            raise ValueError(f"role {role!r} ends, but the open role is {self.role!r}")
        content: str | list[dict[str, Any]] = self.turn_text.lstrip()
        if self.turn_images:
            parts = [{"type": "image_url", "image_url": {"url": url}} for url in self.turn_images]
            content = [{"type": "text", "text": content}, *parts]
        suffix = self.template.get_prefix_and_suffix(role, self.messages)[1]
        self.messages.append({"role": role, "content": content})
        self.text += suffix
        self.role, self.turn_images = None, []

    def add_image(self, source: str | bytes) -> None:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        url = f"data:{_media_type(data)};base64,{base64.b64encode(data).decode()}"
        self.images.append(url)
        self.turn_images.append(url)
        self.text += self.template.image_token


_SIGNATURES: Sequence[tuple[bytes, str]] = (
    (b"\x89PNG", "image/png"),
    (b"GIF8", "image/gif"),
    (b"RIFF", "image/webp"),
)


def _media_type(data: bytes) -> str:
    return next((kind for start, kind in _SIGNATURES if data.startswith(start)), "image/jpeg")
