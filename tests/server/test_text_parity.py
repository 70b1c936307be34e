"""The bundled model's text side against transformers."""

from __future__ import annotations

from typing import Any

import pytest

from trunkline.config.resolve import SEEDLING
from trunkline.text.chat_template import ChatTemplate
from trunkline.text.tokenizer import Tokenizer

TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "text": "é<"}}}
CHATS: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    ([{"role": "user", "content": "hi"}], {}),
    ([{"role": "user", "content": "hi"}], {"enable_thinking": True}),
    ([{"role": "system", "content": "s"}, {"role": "user", "content": "Grüße 🎉"}], {"tools": TOOLS}),
    (
        [
            {"role": "user", "content": "add"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "1"},
        ],
        {"tools": TOOLS},
    ),
    (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "I am "}],
        {"continue_final_message": True},
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def reference() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(SEEDLING)


@pytest.mark.parametrize(("messages", "options"), CHATS)
def test_chats_render_and_encode_alike(
    reference: Any, messages: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    tokenizer = Tokenizer.load(SEEDLING)
    template = ChatTemplate.load(SEEDLING, tokenizer.special_tokens)
    assert template is not None and template.shows_tools and "enable_thinking" in template.variables
    variables = {name: value for name, value in options.items() if name in template.variables}
    text = template.render(
        messages,
        tools=options.get("tools"),
        continue_final_message=options.get("continue_final_message", False),
        variables=variables,
    )
    generates = "continue_final_message" not in options
    expected = reference.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generates, **options
    )
    assert text == expected
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert token_ids == reference(expected, add_special_tokens=False)["input_ids"]
    for skip in (True, False):
        assert tokenizer.decode(token_ids, skip_special_tokens=skip) == reference.decode(
            token_ids, skip_special_tokens=skip
        )
