"""`trunkline make-model`: a model folder with random weights and a tokenizer trained on the spot.

The outputs mean nothing; shapes, files (Hugging Face layout) and speed are those of the real model.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trunkline.config.cli import help_text, parse, wants_help
from trunkline.config.flags import flag
from trunkline.config.memory import show
from trunkline.types import RequestError

ABOUT = "Write a model with random weights and a tokenizer, for tests and benchmarks: no download is needed."
SHARD_BYTES = 512 << 20
TRAINED_TOKENS = 4096  # of the vocabulary; the rest are made-up words that only outputs contain


@dataclass(frozen=True, kw_only=True)
class Options:
    shape: str | None = flag("text", "which model to imitate", choices=("qwen3-0.6b", "llama-3.2-1b", "tiny"))
    out: str | None = flag("path", "folder to write; must not exist, or be empty", metavar="DIR")
    dtype: str | None = flag(
        "text",
        "of the weights. Default: bfloat16, and float32 for tiny",
        choices=("float32", "bfloat16", "float16"),
    )
    seed: int = flag("int", "of weights and tokenizer", default=0, low=0)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A dense decoder with a tied output head; `extra` are further keys of config.json."""

    architecture: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int
    dtype: str
    chat: str  # key of CHATS
    qk_norm: bool
    extra: dict[str, Any]

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the checkpoint, in the order in which they are written."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        for i in range(self.layers):
            at = f"model.layers.{i}"
            yield f"{at}.input_layernorm.weight", (self.hidden,)
            yield f"{at}.self_attn.q_proj.weight", (query, self.hidden)
            yield f"{at}.self_attn.k_proj.weight", (kv, self.hidden)
            yield f"{at}.self_attn.v_proj.weight", (kv, self.hidden)
            yield f"{at}.self_attn.o_proj.weight", (self.hidden, query)
            if self.qk_norm:
                yield f"{at}.self_attn.q_norm.weight", (self.head_dim,)
                yield f"{at}.self_attn.k_norm.weight", (self.head_dim,)
            yield f"{at}.post_attention_layernorm.weight", (self.hidden,)
            yield f"{at}.mlp.gate_proj.weight", (self.inner, self.hidden)
            yield f"{at}.mlp.up_proj.weight", (self.inner, self.hidden)
            yield f"{at}.mlp.down_proj.weight", (self.hidden, self.inner)
        yield "model.norm.weight", (self.hidden,)


def shape_named(name: str) -> Shape:
    """The public dimensions of the model that `name` imitates."""
    if name == "qwen3-0.6b":
        return Shape(
            architecture="Qwen3ForCausalLM", hidden=1024, inner=3072, layers=28, heads=16, kv_heads=8,
            head_dim=128, vocabulary=151936, positions=40960, dtype="bfloat16", chat="chatml", qk_norm=True,
            extra={"model_type": "qwen3", "rope_theta": 1000000.0, "rms_norm_eps": 1e-6},
        )  # fmt: skip
    if name == "llama-3.2-1b":
        scaling = {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }  # fmt: skip
        return Shape(
            architecture="LlamaForCausalLM", hidden=2048, inner=8192, layers=16, heads=32, kv_heads=8,
            head_dim=64, vocabulary=128256, positions=131072, dtype="bfloat16", chat="llama3", qk_norm=False,
            extra={"model_type": "llama", "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
                   "rope_scaling": scaling},
        )  # fmt: skip
    return Shape(
        architecture="Qwen3ForCausalLM", hidden=64, inner=128, layers=2, heads=4, kv_heads=2,
        head_dim=16, vocabulary=512, positions=2048, dtype="float32", chat="chatml", qk_norm=True,
        extra={"model_type": "qwen3", "rope_theta": 10000.0, "rms_norm_eps": 1e-6},
    )  # fmt: skip


@dataclass(frozen=True)
class Chat:
    """Special tokens of a family, and its template."""

    special: tuple[str, ...]
    bos: str | None
    eos: tuple[str, ...]  # the first ends a turn
    pad: str
    template: str


def chat_named(name: str) -> Chat:
    if name == "llama3":
        names = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")
        special = tuple(f"<|{n}|>" for n in names)
        return Chat(
            special,
            special[0],
            (special[4], special[1]),
            special[1],
            "{{ '<|begin_of_text|>' }}{% for message in messages %}"
            "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
            "{{ message['content'] + '<|eot_id|>' }}{% endfor %}"
            "{% if add_generation_prompt %}"
            "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        )
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return Chat(
        special,
        None,
        (special[2], special[0]),
        special[0],
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    )


def run(words: list[str]) -> int:
    if wants_help(words):
        sys.stdout.write(help_text("trunkline make-model --shape NAME --out DIR [FLAGS]", ABOUT, Options))
        return 0
    options = parse(words, Options)
    for name, value in (("--shape", options.shape), ("--out", options.out)):
        if value is None:
            raise RequestError(f"{name} is needed; --help says more", code="missing_flag", param=name)
    assert options.shape is not None and options.out is not None
    size = make_model(options.shape, Path(options.out), dtype=options.dtype, seed=options.seed, progress=True)
    print(f"wrote {options.out}, {show(size)} of weights")
    print(f"serve it with: trunkline serve --model-path {options.out}")
    return 0


def make_model(
    name: str, out: Path, *, dtype: str | None = None, seed: int = 0, progress: bool = False
) -> int:
    """Write the model folder and return the bytes of its weights. config.json comes last: half a folder is no
    model. Raises RequestError when the folder holds something already or the disk is too small.
    """
    shape, chat = shape_named(name), chat_named(shape_named(name).chat)
    dtype = dtype or shape.dtype
    width = 4 if dtype == "float32" else 2
    size = sum(_count(dims) for _, dims in shape.tensors()) * width
    _check_folder(out, size)
    out.mkdir(parents=True, exist_ok=True)
    write_weights(shape, out, dtype, width, seed, progress)
    tokenizer = make_tokenizer(shape.vocabulary, chat, seed)
    tokenizer.save(str(out / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in chat.special}
    tokens = {"bos_token": chat.bos, "eos_token": chat.eos[0], "pad_token": chat.pad}
    _write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": shape.positions,
        "clean_up_tokenization_spaces": False, **{k: v for k, v in tokens.items() if v is not None},
        "chat_template": chat.template,
    })  # fmt: skip
    end = {"bos_token_id": ids.get(chat.bos or ""), "eos_token_id": [ids[token] for token in chat.eos]}
    _write_json(out / "generation_config.json", {**end, "do_sample": True, "temperature": 1.0})
    _write_json(out / "config.json", {
        "architectures": [shape.architecture], "hidden_size": shape.hidden, "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim, "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.positions, "hidden_act": "silu", "tie_word_embeddings": True,
        "attention_bias": False, "torch_dtype": dtype, "bos_token_id": end["bos_token_id"],
        "eos_token_id": ids[chat.eos[0]], **shape.extra,
    })  # fmt: skip
    return size


def write_weights(shape: Shape, out: Path, dtype: str, width: int, seed: int, progress: bool) -> None:
    """Normal(0, 0.02) matrices and unit norms, shard by shard: memory stays below two shards."""
    import torch
    from safetensors.torch import save_file
    from tqdm import tqdm  # type: ignore[import-untyped]

    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, dims in shape.tensors():
        size = _count(dims) * width
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, dims))
        filled += size
    generator = torch.Generator().manual_seed(seed)
    total = sum(_count(dims) * width for shard in shards for _, dims in shard)
    where: dict[str, str] = {}
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress, desc="weights") as bar:
        for number, shard in enumerate(shards, 1):
            file = (
                "model.safetensors"
                if len(shards) == 1
                else f"model-{number:05}-of-{len(shards):05}.safetensors"
            )
            tensors = {}
            for name, dims in shard:
                tensor = torch.ones(dims, dtype=getattr(torch, dtype))
                if len(dims) > 1:
                    tensor.normal_(0.0, 0.02, generator=generator)
                tensors[name] = tensor
                where[name] = file
                bar.update(_count(dims) * width)
            save_file(tensors, str(out / file), metadata={"format": "pt"})
            (out / file).chmod(0o644)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(out / "model.safetensors.index.json", index)


def make_tokenizer(vocabulary: int, chat: Chat, seed: int) -> Any:
    """A byte-level BPE tokenizer of exactly `vocabulary` tokens, trained on generated text.

    Training gives at most TRAINED_TOKENS; the rest of the ids are further made-up words without merges: they
    appear in outputs, never in inputs. Special tokens are the last ids.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    plain = vocabulary - len(chat.special)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=min(plain, TRAINED_TOKENS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    trained.train_from_iterator(generated_text(seed, 4000), trainer)
    model = json.loads(trained.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    draw = random.Random(seed)
    while len(vocab) < plain:
        vocab.setdefault("\u0120" + _word(draw, 2, 6), len(vocab))  # U+0120 is the byte-level form of a blank
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in chat.special]
    )
    if chat.bos is None:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    else:
        first = (chat.bos, tokenizer.token_to_id(chat.bos))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{chat.bos} $A", pair=f"{chat.bos} $A $B", special_tokens=[first]
        )
    return tokenizer


def generated_text(seed: int, lines: int) -> Iterator[str]:
    """Sentences of made-up words with a few frequent ones, numbers, punctuation and JSON, without end."""
    draw = random.Random(seed)
    words = [_word(draw, 1, 4) for _ in range(3000)]
    frequent = [
        "the",
        "of",
        "and",
        "to",
        "a",
        "in",
        "is",
        "that",
        "for",
        "it",
        "was",
        "on",
        "with",
        "you",
        "user",
    ]
    for _ in range(lines):
        line = [
            draw.choice(frequent) if draw.random() < 0.4 else words[int(len(words) * draw.random() ** 3)]
            for _ in range(draw.randint(4, 16))
        ]
        if draw.random() < 0.2:
            line.append(str(draw.randint(0, 10**6)))
        if draw.random() < 0.1:
            line.append(json.dumps({line[0]: line[1], "n": draw.randint(0, 99)}))
        yield " ".join(line).capitalize() + draw.choice((".", ".", "?", "!", ":\n"))


def _word(draw: random.Random, low: int, high: int) -> str:
    return "".join(
        draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(draw.randint(low, high))
    )


def _count(dims: tuple[int, ...]) -> int:
    return dims[0] * (dims[1] if len(dims) > 1 else 1)


def _check_folder(out: Path, size: int) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(
            f"{out} exists and is not an empty folder: choose another --out, or remove it",
            code="folder_not_empty",
            param="--out",
        )
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if size > free:
        raise RequestError(
            f"{show(size)} of weights do not fit the {show(free)} that are free at {parent}: "
            f"{show(size - free)} short",
            code="disk_full",
            param="--out",
        )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
