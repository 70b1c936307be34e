"""Byte-level BPE tokenizer of Seedling, trained on the generated exercises.

Digits and capitals start tokens of their own and a space joins only lowercase words, so a made-up name or a
code is cut the same way wherever it stands: what has to be copied can be copied token by token.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from . import words
from .data import TASKS, generate, prompt_text
from .template import CHAT_TEMPLATE

VOCAB_SIZE = 1536
PATTERN = r" ?\p{Ll}+|\p{Lu}\p{Ll}*|[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKUP = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]


def train(samples: int = 1500) -> Tokenizer:
    """Train on ``samples`` prompts and answers of each task."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = []
    for task in TASKS:
        for seed in range(samples // 5 if task == "needle" else samples):
            sample = generate(task, seed, "train", scale=0.2)
            text = prompt_text(sample) + ("" if task == "spell" else sample.target)
            for mark in SPECIAL + MARKUP:
                text = text.replace(mark, "\n")
            texts.append(text)
    # every listed word should be one token, however rarely the sample at hand shows it
    listed = [*words.WORDS, *words.GOOD, *words.BAD, *words.REVIEWED, *words.FOODS, *words.PETS, *words.ITEMS]
    texts += [" " + word for word in listed for _ in range(400)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL) - len(MARKUP),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, positions: int = 4096) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": positions,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": token in SPECIAL,
            }
            for token in SPECIAL + MARKUP
        },
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE + "\n")


if __name__ == "__main__":
    save(train(), Path(__file__).parents[2] / "src/trunkline/assets/seedling")
