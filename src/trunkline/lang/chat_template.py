"""What stands around each role's text: by template name, by a model's name, or asked of the model's own
template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from trunkline.text.chat_template import ChatTemplate as JinjaTemplate
from trunkline.types import RequestError

Message = dict[str, Any]
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ChatTemplate:
    """Prefix and suffix of each role. `llama2`: the system text stands inside the first user turn."""

    name: str
    role_prefix_and_suffix: Mapping[str, tuple[str, str]]
    default_system_prompt: str | None = None
    stop_str: tuple[str, ...] = ()
    image_token: str = "<image>"
    llama2: bool = False

    def get_prefix_and_suffix(self, role: str, hist_messages: Sequence[Message]) -> tuple[str, str]:
        """Of a turn that follows `hist_messages`."""
        prefix, suffix = self.role_prefix_and_suffix.get(role, ("", ""))
        if self.llama2 and role == "system" and not hist_messages:
            return self.role_prefix_and_suffix["user"][0] + prefix, suffix
        if self.llama2 and role == "user" and [one["role"] for one in hist_messages] == ["system"]:
            return "", suffix
        return prefix, suffix

    def get_prompt(self, messages: Sequence[Message]) -> str:
        """A whole conversation as text. System content None stands for the default prompt."""
        prompt = ""
        for i, message in enumerate(messages):
            content = message["content"]
            if message["role"] == "system" and content is None:
                content = self.default_system_prompt
            if content is not None:
                prefix, suffix = self.get_prefix_and_suffix(message["role"], messages[:i])
                prompt += f"{prefix}{content}{suffix}"
        return prompt


def _roles(*around: tuple[str, str]) -> Mapping[str, tuple[str, str]]:
    return dict(zip(_ROLES, around, strict=True))


def _same(
    before: str, after: str, suffix: str, names: Sequence[str] = _ROLES
) -> Mapping[str, tuple[str, str]]:
    """Roles that differ only in the name between `before` and `after`."""
    return _roles(*((f"{before}{name}{after}", suffix) for name in names))


_ASSISTANT = "You are a helpful assistant."
_CHATML = _same("<|im_start|>", "\n", "<|im_end|>\n")
_IM_END = ("<|im_end|>",)
_LLAMA3 = _same("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>")
_MINICPM = _roles(("", " "), ("user:", " "), ("assistant:", "</s>"))
_DEEPSEEK_END = "<｜end▁of▁sentence｜>"
_DEEPSEEK = _roles(("", ""), ("<｜User｜>", ""), ("<｜Assistant｜>", _DEEPSEEK_END))
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

_VICUNA = _roles(("", " "), ("USER:", " "), ("ASSISTANT:", "</s>"))
_LLAMA2 = _roles(("<<SYS>>\n", "\n<</SYS>>\n\n"), ("[INST] ", " [/INST]"), ("", " </s><s>"))
_MISTRAL = _roles(("[SYSTEM_PROMPT] ", " [/SYSTEM_PROMPT]"), ("[INST] ", " [/INST]"), ("", " </s><s>"))
_LLAMA4 = _same("<|header_start|>", "<|header_end|>\n\n", "<|eot|>")
_YI = _roles(("", ""), ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"), ("", "<|im_end|>\n"))
_GEMMA_END = "<end_of_turn>\n"
_GEMMA = _roles(("", ""), ("<start_of_turn>user\n", _GEMMA_END), ("<start_of_turn>model\n", _GEMMA_END))
_COMMANDS = ("SYSTEM", "USER", "CHATBOT")
_COMMAND_R = _same("<|START_OF_TURN_TOKEN|><|", "_TOKEN|>", "<|END_OF_TURN_TOKEN|>", _COMMANDS)
_GRANITE = _same("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>")

_TEMPLATES = (
    ChatTemplate("default", _roles(("SYSTEM:", "\n"), ("USER:", "\n"), ("ASSISTANT:", "\n"))),
    ChatTemplate("claude", _roles(("", ""), ("\n\nHuman: ", ""), ("\n\nAssistant:", ""))),
    ChatTemplate("deepseek-v3", _DEEPSEEK, None, (_DEEPSEEK_END,)),
    ChatTemplate("janus-pro", _DEEPSEEK, None, (_DEEPSEEK_END,), "<image_placeholder>\n"),
    ChatTemplate("vicuna_v1.1", _VICUNA, _VICUNA_SYSTEM, image_token=" <image>\n"),
    ChatTemplate("llama-2-chat", _LLAMA2, llama2=True),
    ChatTemplate("mistral", _MISTRAL, stop_str=("</s>",), image_token="[IMG]"),
    ChatTemplate("llama-3-instruct", _LLAMA3, None, ("<|eot_id|>",), "<|image|>"),
    ChatTemplate("llama-3-instruct-llava", _LLAMA3, None, ("<|eot_id|>",), "<image>\n"),
    ChatTemplate("llama-4", _LLAMA4, None, ("<|eot|>",), "<|image|>"),
    ChatTemplate("chatml", _CHATML, None, _IM_END),
    ChatTemplate("chatml-llava", _CHATML, _ASSISTANT, _IM_END, "<image>\n"),
    ChatTemplate("qwen2-vl", _CHATML, _ASSISTANT, _IM_END, "<|vision_start|><|image_pad|><|vision_end|>"),
    ChatTemplate("qwen", _CHATML, _ASSISTANT, _IM_END),
    ChatTemplate("yi-1.5", _YI, None, _IM_END),
    ChatTemplate("gemma-it", _GEMMA),
    ChatTemplate("minicpmv", _MINICPM, None, ("<|im_end|>", "<|endoftext|>"), "(<image>./</image>)"),
    ChatTemplate("minicpmo", _MINICPM, None, ("<|im_end|>", "<|endoftext|>"), "(<image>./</image>)"),
    ChatTemplate("c4ai-command-r", _COMMAND_R),
    ChatTemplate("granite-3-instruct", _GRANITE, None, ("<|end_of_text|>",)),
)
TEMPLATES: Mapping[str, ChatTemplate] = MappingProxyType({one.name: one for one in _TEMPLATES})

# Template: models that have it, by words that all stand in a path ("!word": that does not). The first match
# counts.
_MODELS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "deepseek-v3": ("deepseek-v3 !base", "deepseek-r1 !base"),
        "janus-pro": ("janus",),
        "vicuna_v1.1": ("vicuna", "llava-v1.5"),
        "llama-2-chat": ("llama-2 chat", "codellama instruct", "mixtral instruct"),
        "mistral": ("mistral instruct",),
        "llama-3-instruct": ("llama-3 instruct",),
        "llama-4": ("llama-4 instruct",),
        "chatml": ("tinyllama",),
        "qwen2-vl": ("qwen vl",),
        "chatml-llava": ("llava-onevision-qwen2",),
        "qwen": ("qwen chat !llava", "qwen instruct !llava"),
        "yi-1.5": ("yi-1.5 chat",),
        "gemma-it": ("gemma -it",),
        "minicpmv": ("minicpm-v",),
        "minicpmo": ("minicpm-o",),
        "c4ai-command-r": ("c4ai-command-r",),
        "granite-3-instruct": ("granite instruct",),
    }
)


def get_chat_template(name: str) -> ChatTemplate:
    """Raises KeyError with the names that there are."""
    if name not in TEMPLATES:
        raise KeyError(f"there is no chat template {name!r}; there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def get_chat_template_by_model_path(model_path: str) -> ChatTemplate:
    """The template that a model's name or path stands for, else `default`."""
    path = model_path.lower()
    for name, models in _MODELS.items():
        for words in map(str.split, models):
            if all((word.removeprefix("!") in path) is not word.startswith("!") for word in words):
                return TEMPLATES[name]
    return TEMPLATES["default"]


def chat_template_of_model(folder: str) -> ChatTemplate:
    """The template of a model folder: its own, where text around each role doesn't depend on the text inside.

    The model's template renders conversations of marks; what stands around the marks is the answer. The
    prefix of the assistant is the generation prompt. Otherwise, the model's path decides."""
    by_path = get_chat_template_by_model_path(folder)
    if by_path.name != "default":
        return by_path
    try:
        own = JinjaTemplate.load(folder, {})
        return by_path if own is None else _probe(own)
    except (RequestError, ValueError):
        return by_path


_MARK = "@@"


def _probe(own: JinjaTemplate) -> ChatTemplate:
    """Raises ValueError when there is no fixed text around each role, RequestError when the template
    refuses."""

    def after(before: str, *roles: str) -> str:
        text = own.render([{"role": role, "content": _MARK} for role in roles], add_generation_prompt=False)
        if not text.startswith(before):
            raise ValueError("the template rewrites earlier turns")
        return text[len(before) :]

    first = after("", "user")
    assistant = after(first, "user", "assistant")
    user = after(first + assistant, "user", "assistant", "user")
    system = after("", "system", "user").removesuffix(user)
    if first != user or any(text.count(_MARK) != 1 for text in (system, user, assistant)):
        raise ValueError("the template writes more than what stands around each turn")
    generation = own.render([{"role": "user", "content": _MARK}], add_generation_prompt=True)
    around = {
        role: (text.split(_MARK)[0], text.split(_MARK)[1])
        for role, text in (("system", system), ("user", user), ("assistant", assistant))
    }
    around["assistant"] = (generation.removeprefix(first), around["assistant"][1])
    return ChatTemplate("model", around)
