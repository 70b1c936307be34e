"""A byte-level tokeniser, a chat template, and an application over the fake core."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import msgspec
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from tests.server.fake_client import FakeClient
from trunkline.config.schema import EngineConfig, ModelConfig, ObserveConfig, SchedulerConfig, ServerConfig
from trunkline.engine.frontend import Frontend
from trunkline.metrics.prometheus import Metrics
from trunkline.server.call import ServedModel
from trunkline.server.gate import Gate
from trunkline.server.routes import build_app
from trunkline.server.tools.formats import tool_format
from trunkline.text.chat_template import ChatTemplate
from trunkline.text.reasoning import reasoning_format
from trunkline.text.tokenizer import Tokenizer

CORPUS = "Hello, world! How are you? The quick brown fox. Grüße, señor. 日本語のテキスト 🎉👩‍👩‍👧 END STOP "
TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }} <tool_call><|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if add_generation_prompt and enable_thinking %}<think>{% endif %}"
)
REPLY = "Hello, wörld! 日本語 🎉 END of it."


def byte_level_tokenizer() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator([CORPUS] * 4, trainer)
    tags = ("<tool_call>", "</tool_call>", "<think>", "</think>")
    backend.add_tokens([AddedToken(tag, special=False) for tag in tags])
    return backend


@pytest.fixture(scope="session")
def backend() -> tokenizers.Tokenizer:
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def tokenizer(backend: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(backend, {"eos_token": "<|im_end|>"})


@pytest.fixture(scope="session")
def text_folder(backend: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the text side of a model."""
    folder = tmp_path_factory.mktemp("text")
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": {"content": "<|im_end|>"}, "bos_token": None, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def client(tokenizer: Tokenizer) -> FakeClient:
    reply = tokenizer.encode(REPLY)
    return FakeClient(lambda request: reply, eos=2, vocab_size=tokenizer.num_tokens)


@pytest.fixture
def config() -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(path="/models/tiny", served_model_name="tiny", weight_version="v7"),
        scheduler=SchedulerConfig(max_queued=12),
    )


@pytest.fixture
def frontend(client: FakeClient, tokenizer: Tokenizer, config: EngineConfig) -> Frontend:
    return Frontend(client, tokenizer, config)


def make_app(
    client: FakeClient,
    tokenizer: Tokenizer,
    config: EngineConfig,
    template: str | None = TEMPLATE,
    observe: ObserveConfig | None = None,
    **defaults: float,
) -> Gate:
    """The whole application but for the core; `defaults` as from generation_config.json."""
    if observe is not None:
        config = msgspec.structs.replace(config, observe=observe)
    model = ServedModel(
        name="tiny",
        path="/models/tiny",
        architecture="TinyForCausalLM",
        tokenizer=tokenizer,
        template=None if template is None else ChatTemplate(template, tokenizer.special_tokens),
        defaults=defaults,
        weight_version="v7",
        reasoning=reasoning_format(config.server.reasoning_parser, template or ""),
        tools=tool_format(config.server.tool_call_parser, template or ""),
    )
    return build_app(Frontend(client, tokenizer, config), model, Metrics("tiny", config.observe))


@pytest.fixture
def app(client: FakeClient, tokenizer: Tokenizer, config: EngineConfig) -> Gate:
    return make_app(client, tokenizer, config)


def http_client(app: Gate) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.fixture
async def http(app: Gate) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(app) as client:
        yield client


def events_of(body: str) -> list[dict]:
    """Parsed server-sent events; checks the framing."""
    blocks = body.split("\n\n")
    assert blocks[-1] == "" and blocks[-2] == "data: [DONE]"
    assert all(block.startswith("data: ") for block in blocks[:-1])
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


def with_key(config: EngineConfig, key: str) -> EngineConfig:
    return EngineConfig(model=config.model, scheduler=config.scheduler, server=ServerConfig(api_key=key))
