"""The tokeniser of a model folder: `tokenizer.json`, run by the `tokenizers` library."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from trunkline.config.model_spec import ModelError
from trunkline.text.detokenizer import Detokenizer
from trunkline.text.pieces import piece_rules
from trunkline.types import RequestError

LONG_TEXT = 8192  # characters; a longer text is encoded in a thread, so that the event loop goes on


class Tokenizer:
    """Text to token ids and back. Immutable; safe to share between threads."""

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: dict[str, str] | None = None) -> None:
        """`special_tokens`: names of tokens for chat templates, e.g. {"bos_token": "<s>"}.

        Raises ValueError for a decoder that can't work token by token.
        """
        self._backend = backend
        self._pieces: dict[int, bytes] = {}
        self.rules = piece_rules(json.loads(backend.to_str()).get("decoder"))
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._added = {token_id: token.content.encode() for token_id, token in added.items()}
        self._specials = {token.content: token_id for token_id, token in added.items() if token.special}
        self.special_tokens = special_tokens or {}

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Raises ModelError when the folder has no usable tokenizer.json."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"{path} is missing: a model needs its tokeniser (or give --tokenizer-path)", "no_tokenizer"
            )
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)), _special_tokens(Path(folder)))
        except Exception as error:  # the library raises plain Exception
            raise ModelError(f"{path} can't be used: {error}", "bad_tokenizer") from error

    # ------------------------------------------------------------------ text to ids
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the tokens that the model wants around every text (e.g. a first BOS) if
        asked for. Raises RequestError for text that has no UTF-8 form."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"character {error.start} of the text is U+{ord(text[error.start]):04X}, a lone surrogate, "
                "which is no valid Unicode: send pairs, or U+FFFD in its place",
                code="invalid_unicode",
            ) from error
        # The batch call releases the interpreter lock while it works, the single one does not.
        ids: list[int] = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    async def encode_async(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """`encode`; a long text is encoded off the event loop."""
        if len(text) <= LONG_TEXT:
            return self.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.encode, text, add_special_tokens=add_special_tokens)

    def encode_words(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids, without those that are put around a text, and for each the number of its word: a stretch
        of text that is encoded without regard to what stands around it (as the pre-tokeniser splits)."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, [-1 if word is None else word for word in encoding.word_ids]

    def special_ids_of(self, texts: Iterable[str]) -> frozenset[int]:
        """Of those texts that are special tokens."""
        return frozenset(self._specials[text] for text in texts if text in self._specials)

    # ------------------------------------------------------------------ ids to text
    def piece(self, token_id: int) -> bytes:
        """Bytes of one token; empty for an id that the tokeniser does not have."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._added.get(token_id)
            if piece is None:
                token = self._backend.id_to_token(token_id)
                piece = b"" if token is None else self.rules.to_bytes(token)
            self._pieces[token_id] = piece
        return piece

    def token_text(self, token_id: int) -> str:
        """One token on its own; U+FFFD where it holds only a part of a character."""
        return self.piece(token_id).decode("utf-8", "replace")

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The whole text of a sequence."""
        return Detokenizer(self, skip_special_tokens=skip_special_tokens, at_start=True).decode(token_ids)

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary with added tokens; the model's embedding may be larger."""
        return self._backend.get_vocab_size(with_added_tokens=True)


def _special_tokens(folder: Path) -> dict[str, str]:
    """Named tokens of tokenizer_config.json: values are text, or an object with `content`."""
    path = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    contents = {name: value["content"] if isinstance(value, dict) else value for name, value in named.items()}
    return {name: content for name, content in contents.items() if isinstance(content, str)}
