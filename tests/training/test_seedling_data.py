"""The generator of the bundled model's exercises, its checker, tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from training.seedling.data import TASKS, check, generate, prompt_text
from training.seedling.template import CHAT_TEMPLATE, render

ASSETS = Path(__file__).parents[2] / "src/trunkline/assets/seedling"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(ASSETS / "tokenizer.json"))


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_gives_the_same_sample(task: str) -> None:
    assert generate(task, 7) == generate(task, 7)
    assert prompt_text(generate(task, 7)) != prompt_text(generate(task, 8))


@pytest.mark.parametrize("task", TASKS)
def test_the_checker_takes_the_answer_and_nothing_else(task: str) -> None:
    for seed in range(40):
        sample = generate(task, seed)
        assert check(sample, sample.target)
        assert check(sample, sample.target + "<|im_end|>")
        assert not check(sample, sample.target + " x")
        assert not check(sample, "")
        other = generate(task, seed + 1000)
        assert check(sample, other.target) == (
            sample.thinking == other.thinking and sample.answer == other.answer
        )


@pytest.mark.parametrize("task", TASKS)
def test_training_and_evaluation_share_no_prompt(task: str) -> None:
    train = {prompt_text(generate(task, seed, "train")) for seed in range(300)}
    assert not train & {prompt_text(generate(task, seed, "eval")) for seed in range(300)}


@pytest.mark.parametrize("task", TASKS)
def test_the_tokenizer_gives_the_text_back(task: str, tokenizer: Tokenizer) -> None:
    for seed in range(20):
        sample = generate(task, seed, scale=0.1)
        text = prompt_text(sample) + sample.target
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_tokenizer_has_every_byte_and_single_digits(tokenizer: Tokenizer) -> None:
    text = "caf\u00e9 \u4f60\u597d \U0001f331\t\r\n \x00 42"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode("4096", add_special_tokens=False).tokens == ["4", "0", "9", "6"]


def test_prompts_fit_the_context(tokenizer: Tokenizer) -> None:
    lengths = [len(tokenizer.encode(prompt_text(generate("needle", seed))).ids) for seed in range(60)]
    assert max(lengths) > 1500
    assert max(lengths) < 2300


def test_the_template_renders_all_roles() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "a<b"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Do it."}]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": "Thanks"},
    ]
    assert render(messages, [tool]) == (
        "<|im_start|>system\nBe brief.\n\n# Tools\n\nYou may call these functions:\n<tools>\n"
        + json.dumps(tool["function"])
        + "\n</tools>\n\nTo call a function, answer with:\n<tool_call>\n"
        + '{"name": <function-name>, "arguments": '
        "<args-json-object>}\n</tool_call><|im_end|>\n"
        "<|im_start|>user\nDo it.<|im_end|>\n"
        "<|im_start|>assistant\n<tool_call>\n"
        '{"name": "f", "arguments": {"x": "a<b"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nDone.<|im_end|>\n"
        "<|im_start|>user\nThanks<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_the_template_switches_thinking() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    assert render(messages, enable_thinking=True).endswith("<|im_start|>assistant\n")
    assert render(messages, enable_thinking=False).endswith("<think>\n\n</think>\n\n")
    past = [
        *messages,
        {"role": "assistant", "content": "<think>\nold\n</think>\n\nHello!"},
        *messages,
        {"role": "assistant", "content": "Hello!", "reasoning_content": "new"},
    ]
    text = render(past, add_generation_prompt=False)
    assert "old" not in text
    assert text.endswith("<think>\nnew\n</think>\n\nHello!<|im_end|>\n")


def test_the_assets_hold_this_template() -> None:
    config = json.loads((ASSETS / "tokenizer_config.json").read_text())
    assert config["chat_template"] == CHAT_TEMPLATE
    assert (ASSETS / "chat_template.jinja").read_text() == CHAT_TEMPLATE + "\n"
