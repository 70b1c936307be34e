"""What `/generate` and the in-process engine share: from prompts and sampling parameters to native calls."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from functools import cached_property
from pathlib import Path
from typing import Any

from trunkline.lang.backends.backend import Backend, Piece, Prompt, TokenPath
from trunkline.lang.chat_template import ChatTemplate, chat_template_of_model, get_chat_template
from trunkline.lang.choices import ChoicesDecision
from trunkline.lang.global_config import global_config
from trunkline.lang.ir import DTYPES, Sampling, Select
from trunkline.text.tokenizer import Tokenizer
from trunkline.types import RequestError

Answer = dict[str, Any]

PREFILL: Mapping[str, Any] = {"sampling_params": {"max_new_tokens": 0, "temperature": 0.0}}
_LOGPROBS = ("return_logprob", "logprob_start_len", "top_logprobs_num", "return_text_in_logprobs")


class NativeBackend(Backend):
    """A backend that speaks the native protocol. `call` and `stream` are all that subclasses add."""

    def __init__(self, chat_template_name: str | None = None) -> None:
        self._template_name = chat_template_name

    # ------------------------------------------------------------------ what subclasses have
    async def call(self, fields: dict[str, Any]) -> Any:
        """The answer, or the list of answers, to a call of /generate."""
        raise self.unsupported("generate")

    async def call_from(self, path: TokenPath, fields: dict[str, Any]) -> tuple[Any, object]:
        """`call`, and the place of its tokens: the server may have those of `path`, which the prompt may
        begin with."""
        return await self.call(fields), None

    def stream(self, fields: dict[str, Any]) -> AsyncGenerator[Answer, None]:
        """Answers whose text is cumulative."""
        raise self.unsupported("stream")

    @property
    def model_path(self) -> str:
        """A folder here, or the name of a model elsewhere."""
        return ""

    @property
    def tokenizer_path(self) -> str:
        return self.model_path

    # ------------------------------------------------------------------ the model's text side
    @cached_property
    def chat_template(self) -> ChatTemplate:
        """May be assigned."""
        if self._template_name is not None:
            return get_chat_template(self._template_name)
        return chat_template_of_model(self.model_path)

    def get_chat_template(self) -> ChatTemplate:
        return self.chat_template

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """None when the model's folder is not on this machine: then the server tokenizes whole texts."""
        here = (Path(self.tokenizer_path) / "tokenizer.json").is_file()
        return Tokenizer.load(self.tokenizer_path) if here else None

    # ------------------------------------------------------------------ calls
    async def generate(self, prompt: Prompt, sampling: Sampling, stream: bool) -> AsyncGenerator[Piece, None]:
        fields = self._prompt_fields(prompt) | {"sampling_params": sampling_fields(sampling)}
        fields |= {name: one for name, one in sampling.given().items() if name in _LOGPROBS}
        if sampling.n != 1 or not stream:
            answer, place = await self.call_from(prompt.path, fields)
            if isinstance(answer, list):
                yield [one["text"] for one in answer], answer[0]["meta_info"]
                return
            self._advance(prompt, fields, answer, place)
            yield answer["text"], answer["meta_info"]
            return
        shown, answer = 0, None
        async with aclosing(self.stream(fields)) as answers:
            async for answer in answers:
                yield answer["text"][shown:], answer["meta_info"]
                shown = len(answer["text"])
        if answer is not None:
            self._advance(prompt, fields, answer)

    def _prompt_fields(self, prompt: Prompt) -> dict[str, Any]:
        """The prompt as token ids where they are known, so that only new text is tokenized; else as text."""
        images = {"image_data": prompt.images} if prompt.images else {}
        if self.tokenizer is None or images or not prompt.text:
            return {"text": prompt.text, **images}
        known, fragment = prompt.path, prompt.text[prompt.path.length :]
        if known.ids:
            ids = self.tokenizer.encode(fragment, add_special_tokens=False)
            last = list(known.ids[-1:])  # some tokenizers begin each text with a blank of their own
            joined = self.tokenizer.decode(last + ids, skip_special_tokens=False)
            if joined == self.tokenizer.decode(last, skip_special_tokens=False) + fragment:
                return {"input_ids": [*known.ids, *ids]}
        return {"input_ids": self.tokenizer.encode(prompt.text)}

    def _advance(self, prompt: Prompt, fields: dict[str, Any], answer: Answer, place: object = None) -> None:
        """Note the tokens that were generated: as many of them as lie wholly in the text that is kept."""
        if self.tokenizer is None or "input_ids" not in fields:
            return
        ids, kept = list(answer["output_ids"]), answer["text"]
        while ids and not kept.startswith(text := self.tokenizer.decode(ids, skip_special_tokens=False)):
            ids.pop()  # an end token, or the tokens of a stop string
        length = len(prompt.text) + (len(text) if ids else 0)
        prompt.path = TokenPath([*fields["input_ids"], *ids], length, place)

    async def commit(self, prompt: Prompt) -> None:
        if prompt.text:
            await self.call({**self._prompt_fields(prompt), **PREFILL})

    # ------------------------------------------------------------------ select
    async def select(self, prompt: Prompt, select: Select) -> ChoicesDecision:
        """Scores each choice by the tokens in which it differs from the prompt alone.

        A choice may change how the prompt's last tokens are cut; its score begins where the tokens part, so
        no boundary between prompt and choice is favored (token healing)."""
        base = await self._prompt_ids(prompt.text)
        texts = [prompt.text + choice for choice in select.choices]
        answers = await self._score(texts, max(len(base) - 2, 0))
        starts = [common_prefix(base, answer["prompt_token_ids"]) for answer in answers]
        earliest = min(starts)
        if 0 < earliest < len(base) - 1:  # the cut moved by more than a token: ask again from there
            answers = await self._score(texts, earliest - 1)
        inputs = []
        for answer, start in zip(answers, starts, strict=True):
            entries = answer["meta_info"]["input_token_logprobs"]
            tokens = len(answer["prompt_token_ids"]) - start
            inputs.append(entries[len(entries) - tokens :] if tokens else entries[-1:])
        alone = None
        if select.method.requires_unconditional_logprobs:
            ids = [[entry[1] for entry in entries] for entries in inputs]
            bare = await self.call(
                {"input_ids": ids, **PREFILL, "return_logprob": True, "logprob_start_len": 0}
            )
            alone = [one["meta_info"]["input_token_logprobs"] for one in bare]
        return select.decide(inputs, [one["meta_info"]["output_token_logprobs"] for one in answers], alone)

    async def _prompt_ids(self, text: str) -> list[int]:
        if not text:
            return []
        if self.tokenizer is not None:
            return self.tokenizer.encode(text)
        answer = await self.call({"text": text, **PREFILL, "return_prompt_token_ids": True})
        return list(answer["prompt_token_ids"])

    async def _score(self, texts: list[str], start: int) -> list[Answer]:
        fields = {
            "text": texts,
            **PREFILL,
            "return_logprob": True,
            "return_text_in_logprobs": True,
            "logprob_start_len": start,
            "return_prompt_token_ids": True,
        }
        answers: list[Answer] = await self.call(fields)
        return answers


def sampling_fields(sampling: Sampling) -> dict[str, Any]:
    """`sampling_params` of a native call. Raises RequestError for a dtype that there is no rule for."""
    fields = {
        name: one for name, one in sampling.given().items() if name not in (*_LOGPROBS, "stop", "dtype")
    }
    stops = list(sampling.stops)
    if sampling.dtype is not None:
        fields["regex"] = dtype_regex(sampling.dtype)
        if sampling.dtype in (int, "int", float, "float"):
            stops += [" ", "\n"]
    if stops:
        fields["stop"] = stops
    if fields.get("stop_token_ids") is not None:
        fields["stop_token_ids"] = list(fields["stop_token_ids"])
    fields["skip_special_tokens"] = global_config.skip_special_tokens_in_output
    fields["spaces_between_special_tokens"] = global_config.spaces_between_special_tokens_in_out
    return fields


def dtype_regex(dtype: type | str) -> str:
    """Raises RequestError for an unknown type."""
    name = dtype if isinstance(dtype, str) else dtype.__name__
    if name not in DTYPES:
        raise RequestError(
            f"dtype is {name}; it must be one of int, float, bool, str", code="invalid_value", param="dtype"
        )
    return DTYPES[name]


def common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the common prefix."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
