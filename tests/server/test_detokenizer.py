"""Incremental decoding equals decoding the whole, whatever the tokeniser's kind."""

from __future__ import annotations

import random

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from tests.server.conftest import byte_level_tokenizer
from trunkline.text.detokenizer import Detokenizer
from trunkline.text.tokenizer import Tokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def sentencepiece_like(decoder: tokenizers.decoders.Decoder) -> tokenizers.Tokenizer:
    words = ["<unk>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", "a", "b", "é", "▁a", "▁▁", "日"]
    backend = tokenizers.Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [("▁", "a"), ("▁", "▁")], byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return backend


LLAMA = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
BYTE_LEVEL = Tokenizer(byte_level_tokenizer())
LLAMA_LIKE = Tokenizer(sentencepiece_like(LLAMA))


def deltas(tokenizer: Tokenizer, token_ids: list[int], **options: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, **options)
    return [*map(detokenizer.feed, token_ids), detokenizer.flush()]


@given(TEXTS)
def test_text_survives(text: str) -> None:
    token_ids = BYTE_LEVEL.encode(text)
    parts = deltas(BYTE_LEVEL, token_ids)
    assert "".join(parts) == text == BYTE_LEVEL.decode(token_ids)
    assert "�" in text or not any("�" in part for part in parts)


@given(st.lists(st.integers(0, BYTE_LEVEL.num_tokens + 3), max_size=30), st.booleans())
def test_any_ids_decode_like_the_library(token_ids: list[int], skip: bool) -> None:
    whole = BYTE_LEVEL._backend.decode(token_ids, skip_special_tokens=skip)
    parts = deltas(BYTE_LEVEL, token_ids, skip_special_tokens=skip)
    assert "".join(parts) == whole == BYTE_LEVEL.decode(token_ids, skip_special_tokens=skip)


def test_a_character_comes_whole_with_its_last_byte() -> None:
    ids = [BYTE_LEVEL._backend.token_to_id(token) for token in ("ð", "Ł", "İ", "ī", "a")]
    assert b"".join(map(BYTE_LEVEL.piece, ids)) == "🎉a".encode()
    assert deltas(BYTE_LEVEL, ids) == ["", "", "", "🎉", "a", ""]
    assert deltas(BYTE_LEVEL, ids[:3]) == ["", "", "", "�"]
    assert deltas(BYTE_LEVEL, [ids[0], ids[4]]) == ["", "�a", ""]


@given(TEXTS)
def test_sentencepiece_text_survives(text: str) -> None:
    text = text.replace("▁", "_").lstrip(" ")  # this kind adds one space, so a first one is lost
    token_ids = LLAMA_LIKE.encode(text)
    assert LLAMA_LIKE.decode(token_ids) == text == LLAMA_LIKE._backend.decode(token_ids)
    assert "".join(deltas(LLAMA_LIKE, token_ids, at_start=True)) == text


def test_output_that_continues_a_prompt_keeps_its_space() -> None:
    prompt, output = LLAMA_LIKE.encode("ab"), [LLAMA_LIKE._backend.token_to_id("▁a")]
    assert "".join(deltas(LLAMA_LIKE, output)) == " a"
    assert LLAMA_LIKE.decode(prompt) + " a" == LLAMA_LIKE.decode(prompt + output)


@pytest.mark.parametrize("scheme", ["always", "never"])
def test_metaspace_decoder(scheme: str) -> None:
    tokenizer = Tokenizer(sentencepiece_like(decoders.Metaspace(replacement="▁", prepend_scheme=scheme)))
    for words in (["▁a", "b", "▁a"], ["a", "▁", "b"], ["▁", "a"]):
        ids = [tokenizer._backend.token_to_id(word) for word in words]
        assert tokenizer.decode(ids) == tokenizer._backend.decode(ids)


def test_words_without_a_decoder() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer = Tokenizer(backend)
    ids = [3, 0, 1, 4, 3, 2]
    assert tokenizer.decode(ids, skip_special_tokens=False) == backend.decode(ids, skip_special_tokens=False)
    assert tokenizer.decode(ids) == backend.decode(ids) == "a b c"
    close = Detokenizer(
        tokenizer, skip_special_tokens=False, spaces_between_special_tokens=False, at_start=True
    )
    assert close.decode(ids) == "<s> a b </s><s> c"
    assert "".join(deltas(tokenizer, [0, 1])) == " a b"  # it goes on behind a prompt


def test_a_decoder_that_needs_its_neighbours_is_refused() -> None:
    backend = byte_level_tokenizer()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="'WordPiece'"):
        Tokenizer(backend)


def test_random_bytes_in_any_split() -> None:
    rng = random.Random(3)
    for _ in range(200):
        data = bytes(rng.randrange(256) for _ in range(rng.randrange(12)))
        ids = [LLAMA_LIKE._backend.token_to_id(f"<0x{byte:02X}>") for byte in data]
        assert "".join(deltas(LLAMA_LIKE, ids)) == data.decode("utf-8", "replace")
