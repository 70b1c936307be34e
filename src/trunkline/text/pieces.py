"""How a `tokenizer.json` turns tokens back into bytes, read from its decoder section.

Working on bytes, one token at a time, makes decoding incremental and independent of how the tokens were split
into messages: no window of earlier tokens has to be decoded again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level BPE (GPT-2): printable bytes stand for themselves,
    the others for code points from 256 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


@dataclass(frozen=True)
class PieceRules:
    """Token text to bytes. `strip_start`: (character, most copies) dropped where a whole text starts."""

    byte_level: Mapping[str, int] | None = None
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    strip_start: tuple[str, int] = ("", 0)
    separator: bytes = b""  # goes between any two tokens

    def to_bytes(self, token: str) -> bytes:
        if self.byte_level is not None:
            try:
                return bytes(self.byte_level[char] for char in token)
            except KeyError:  # an added token, written as it is
                return token.encode()
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for old, new in self.replacements:
            token = token.replace(old, new)
        return token.encode()


@dataclass
class _Builder:
    byte_level: bool = False
    byte_fallback: bool = False
    replacements: list[tuple[str, str]] = field(default_factory=list)
    strip_start: tuple[str, int] = ("", 0)
    fused: bool = False

    def add(self, step: Mapping[str, Any]) -> None:
        match step:
            case {"type": "Sequence", "decoders": list(steps)}:
                for inner in steps:
                    self.add(inner)
            case {"type": "ByteLevel"}:
                self.byte_level = True
            case {"type": "ByteFallback"}:
                self.byte_fallback = True
            case {"type": "Fuse"}:
                self.fused = True
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                self.replacements.append((old, new))
            case {"type": "Metaspace", "replacement": str(mark)}:
                self.replacements.append((mark, " "))
                if step.get("prepend_scheme", "always") != "never":
                    self.strip_start = (" ", 1)
            case {"type": "Strip", "content": str(char), "start": int(start), "stop": 0} if self.fused:
                self.strip_start = (char, start)
            case _:
                raise ValueError(f"decoder step {step.get('type')!r} in this place is not supported")


def piece_rules(decoder: Mapping[str, Any] | None) -> PieceRules:
    """Rules for the `decoder` section of a tokenizer.json. Without one, tokens are words with spaces between.

    Raises ValueError for a decoder that can't work token by token, naming its step.
    """
    if decoder is None:
        return PieceRules(separator=b" ")
    built = _Builder()
    built.add(decoder)
    return PieceRules(
        byte_level=_byte_level_alphabet() if built.byte_level else None,
        byte_fallback=built.byte_fallback,
        replacements=tuple(built.replacements),
        strip_start=built.strip_start,
    )
