"""Tokeniser, output text, chat templates."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.conftest import REPLY, TEMPLATE, byte_level_tokenizer
from trunkline.config.model_spec import ModelError
from trunkline.text import chat_template
from trunkline.text.chat_template import ChatTemplate
from trunkline.text.output import OutputText
from trunkline.text.tokenizer import LONG_TEXT, Tokenizer
from trunkline.types import FinishReason, RequestError, SamplingParams

TOKENIZER = Tokenizer(byte_level_tokenizer())
USER = [{"role": "user", "content": "hi"}]


# ---------------------------------------------------------------------- tokeniser
def test_load_a_folder(text_folder: Path) -> None:
    tokenizer = Tokenizer.load(text_folder)
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>"}
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>b")) == "ab"
    assert tokenizer.token_text(2) == "<|im_end|>"
    assert tokenizer.piece(10**6) == b""


@pytest.mark.parametrize("content", [None, "{", '{"model": {}}'])
def test_a_broken_folder_says_so(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json") as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.code == ("no_tokenizer" if content is None else "bad_tokenizer")


def test_lone_surrogates_are_named() -> None:
    with pytest.raises(RequestError, match=r"character 2 .* U\+D83D, a lone") as caught:
        TOKENIZER.encode("ab\ud83d")
    assert caught.value.code == "invalid_unicode"


async def test_a_long_text_does_not_block_the_loop() -> None:
    text = "The quick brown fox. " * 6_000
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    ticking = asyncio.create_task(tick())
    assert len(text) > LONG_TEXT
    assert await TOKENIZER.encode_async(text) == TOKENIZER.encode(text)
    ticking.cancel()
    assert ticks >= 5


# ---------------------------------------------------------------------- output text
def pieces_of(
    token_ids: list[int], params: SamplingParams, sizes: list[int]
) -> tuple[str, int, FinishReason]:
    """Text, tokens and reason of an output whose messages have these sizes."""
    output, text, at, end = OutputText(TOKENIZER, params), "", 0, len(token_ids)
    while True:
        size = sizes[at % len(sizes)] if sizes else end
        part, at = token_ids[at : at + size], min(at + size, end)
        delta, used, finish = output.feed(part, FinishReason("stop", matched=2) if at == end else None)
        text += delta
        assert finish is None or used <= len(part)
        if finish is not None:
            return text, output.num_tokens, finish


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=5),
    st.sampled_from([(), ("END",), ("語", " 🎉"), ("of it.",), ("it.<|im_end|>",), ("ö",)]),
    st.booleans(),
    st.integers(0, 30),
)
def test_message_sizes_change_nothing(
    sizes: list[int], stop: tuple[str, ...], keep: bool, least: int
) -> None:
    params = SamplingParams(stop=stop, no_stop_trim=keep, min_new_tokens=least, skip_special_tokens=False)
    token_ids = [*TOKENIZER.encode(REPLY), 2]
    assert pieces_of(token_ids, params, sizes) == pieces_of(token_ids, params, [])


def test_stop_string_ends_the_text_before_it() -> None:
    token_ids = [*TOKENIZER.encode(REPLY), 2]
    text, count, finish = pieces_of(token_ids, SamplingParams(stop=("END",)), [])
    assert (text, finish) == (REPLY[: REPLY.index("END")], FinishReason("stop", matched="END"))
    assert TOKENIZER.decode(token_ids[:count]).endswith("END")
    kept, _, _ = pieces_of(token_ids, SamplingParams(stop=("END",), no_stop_trim=True), [])
    assert kept == text + "END"


def test_stop_token_text_is_kept_only_on_demand() -> None:
    token_ids = [*TOKENIZER.encode("a"), 2]
    shown = SamplingParams(skip_special_tokens=False)
    assert pieces_of(token_ids, shown, [])[0] == "a"
    kept = SamplingParams(skip_special_tokens=False, no_stop_trim=True)
    assert pieces_of(token_ids, kept, [])[0] == "a<|im_end|>"


def test_a_stop_string_does_not_count_below_min_new_tokens() -> None:
    token_ids = [*TOKENIZER.encode("END a END"), 2]
    text, _, _ = pieces_of(token_ids, SamplingParams(stop=("END",), min_new_tokens=3), [])
    assert text == "END a "


# ---------------------------------------------------------------------- chat templates
def test_template_of_a_folder(text_folder: Path, tmp_path: Path) -> None:
    template = ChatTemplate.load(text_folder, {})
    assert template is not None and template.source == TEMPLATE
    assert template.variables == {"enable_thinking"}
    other = tmp_path / "other.jinja"
    other.write_text("{{ bos_token }}{{ messages[0].content }}")
    overridden = ChatTemplate.load(text_folder, {"bos_token": "<s>"}, str(other))
    assert overridden is not None and overridden.render(USER) == "<s>hi"
    assert ChatTemplate.load(tmp_path, {}) is None


def test_named_templates_and_own_file(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.load(tmp_path, {})
    assert template is not None and template.source == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    template = ChatTemplate.load(tmp_path, {})
    assert template is not None and template.source == "J"
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ModelError, match="does not parse"):
        ChatTemplate.load(tmp_path, {})


def test_continue_final_message_ends_inside_it() -> None:
    template = ChatTemplate(TEMPLATE)
    messages = [*USER, {"role": "assistant", "content": "I am "}]
    assert template.render(messages, continue_final_message=True).endswith("<|im_start|>assistant\nI am ")
    blind = ChatTemplate("{{ messages[0].content }}")
    with pytest.raises(RequestError, match="does not show the final message"):
        blind.render(messages, continue_final_message=True)


def test_what_templates_of_known_models_use() -> None:
    source = (
        "{% generation %}{{ [1, {'b': 'é<', 'a': 2}] | tojson(indent=2) }}{% endgeneration %}"
        "{{ strftime_now('%Y') | length }}{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}"
        "{{ loop.index }}{% endfor %}{{ 'a' ~ 1 ~ 'b' }}{{ 'x' * 3 }}"
    )
    assert ChatTemplate(source).render(USER) == '[\n  1,\n  {\n    "b": "é<",\n    "a": 2\n  }\n]41a1bxxx'


HOSTILE = {
    "empty loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "macro tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling, *": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x=n.x * 2 %}{% endfor %}",
    "repeating": "{{ 'a' * 1000000000 }}",
    "long list": "{{ ([0] * 1000000000) | length }}",
    "power": "{{ 10 ** 100000000 }}",
    "output": "{% for i in range(100000) %}{{ messages[0].content * 1000 }}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "TIME_LIMIT", 0.2)
    template = ChatTemplate(HOSTILE[name])
    started = time.monotonic()
    with pytest.raises(RequestError) as caught:
        template.render(USER)
    assert caught.value.code == "chat_template_limit"
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    "name", ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"]
)
def test_templates_reach_nothing(name: str) -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate(name).render(USER)
    assert caught.value.code == "chat_template_error"
    assert "__mro__" not in caught.value.message


def test_a_template_can_refuse() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="roles must alternate"):
        template.render(USER)
