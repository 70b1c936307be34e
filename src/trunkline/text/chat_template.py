"""Chat templates: Jinja text from a model folder, rendered in a sandbox with bounds on time and output.

A template is data from outside. It can reach nothing but its arguments, and one that loops or grows without
end is stopped: every loop turn and macro call checks the time, every `+`, `*` and `~` the size of its result.
"""

from __future__ import annotations

import datetime
import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trunkline.config.model_spec import ModelError
from trunkline.types import RequestError

TIME_LIMIT = 2.0  # seconds for one rendering
OUTPUT_LIMIT = 16 * 2**20  # characters
_TICK = "__tick__"
_FIXED = frozenset(
    {
        "messages",
        "tools",
        "add_generation_prompt",
        "raise_exception",
        "strftime_now",
        "range",
        "namespace",
        _TICK,
    }
)

Message = Mapping[str, Any]

log = logging.getLogger(__name__)


class _Refused(Exception):
    """The template itself called raise_exception; its text is for the client."""


class _OverBudget(Exception):
    """A bound was passed."""


class _Generation(Extension):
    """`{% generation %}` marks the assistant's tokens for training; here it only shows its body."""

    tags = {"generation"}  # noqa: RUF012  (declared so by the library)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Generator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat_within_limit((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Sandbox(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        repeated: list[nodes.For | nodes.Macro | nodes.CallBlock] = []
        repeated += [*tree.find_all(nodes.For), *tree.find_all(nodes.Macro), *tree.find_all(nodes.CallBlock)]
        for node in repeated:
            tick = nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno).set_environment(self))
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
        numbers = [abs(side) for side in (left, right) if isinstance(side, int)]
        if operator == "**":
            too_big = max(numbers, default=0) > 64
        elif operator == "+":
            too_big = sum(sizes) > OUTPUT_LIMIT
        else:
            too_big = bool(sizes) and max(sizes) * max(numbers, default=1) > OUTPUT_LIMIT
        if too_big:
            raise _OverBudget
        return super().call_binop(context, operator, left, right)

    def concat_within_limit(self, parts: Sequence[Any]) -> str:
        texts = [str(part) for part in parts]
        if sum(map(len, texts)) > OUTPUT_LIMIT:
            raise _OverBudget
        return "".join(texts)


def _to_json(
    value: Any,
    indent: int | None = None,
    ensure_ascii: bool = False,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as templates are trained with: no HTML escapes, keys in their given order."""
    return json.dumps(
        value, indent=indent, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


class ChatTemplate:
    """A compiled template and the named tokens (bos_token, ...) that it may print.

    `variables`: further names that it reads; `shows_tools`: whether it knows of tools at all.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """Raises ValueError when the source is no valid template."""
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = environment.from_string(source)
            names = meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template does not parse: {error}") from error
        self.shows_tools = "tools" in names
        self.variables = names - _FIXED - self._special_tokens.keys()

    @classmethod
    def load(
        cls, folder: str | Path, special_tokens: Mapping[str, str], override: str | None = None
    ) -> ChatTemplate | None:
        """The template of a model folder, or of the file `override`; None when the folder has none.

        Looks at chat_template.jinja, then `chat_template` of tokenizer_config.json (text, or a list of named
        ones, of which "default" counts). Raises ModelError for a file that is missing or does not parse.
        """
        where = Path(override) if override else Path(folder)
        try:
            source = where.read_text("utf-8") if override else _find_source(where)
            return None if source is None else cls(source, special_tokens)
        except (OSError, ValueError) as error:
            raise ModelError(f"{where}: {error}", "bad_chat_template") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation. With `continue_final_message` it ends inside the last message, which
        the model goes on writing. `variables` may name only what the template reads.

        Raises RequestError: the template refuses the messages, or passes its bounds.
        """
        end = ""
        if continue_final_message:
            add_generation_prompt = False
            end = f"[end-{uuid.uuid4().hex}]"
            messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + end}]
        arguments = {
            **self._special_tokens,
            **(variables or {}),
            "messages": messages,
            "tools": tools or None,
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._render_within_bounds(arguments)
        if not end:
            return text
        if end not in text:
            raise RequestError(
                "this model's chat template does not show the final message, so it can't be continued",
                code="chat_template_error",
                param="continue_final_message",
            )
        return text[: text.rindex(end)]

    def _render_within_bounds(self, arguments: dict[str, Any]) -> str:
        parts: list[str] = []
        size = 0
        tick = _deadline(TIME_LIMIT)
        try:
            for part in self._template.generate(**arguments, **{_TICK: tick}):
                tick()
                size += len(part)
                if size > OUTPUT_LIMIT:
                    raise _OverBudget
                parts.append(part)
        except _Refused as refused:
            raise RequestError(
                f"the model's chat template refuses these messages: {refused}",
                code="chat_template_error",
                param="messages",
            ) from refused
        except (_OverBudget, MemoryError, RecursionError) as error:
            raise RequestError(
                f"the chat template passed its bounds: {TIME_LIMIT:g} s, {OUTPUT_LIMIT} characters of output",
                code="chat_template_limit",
                param="messages",
            ) from error
        except Exception as error:  # a template can raise anything, e.g. on a field that it does not expect
            log.info("a chat template failed: %s: %s", type(error).__name__, error)
            raise RequestError(
                "the model's chat template can't render these messages: a field that it needs is missing, or "
                "has another type than it expects",
                code="chat_template_error",
                param="messages",
            ) from error
        return "".join(parts)


def _deadline(seconds: float) -> Callable[[], None]:
    end = time.monotonic() + seconds

    def tick() -> None:
        if time.monotonic() > end:
            raise _OverBudget

    return tick


def _find_source(folder: Path) -> str | None:
    own_file = folder / "chat_template.jinja"
    if own_file.is_file():
        return own_file.read_text("utf-8")
    config = folder / "tokenizer_config.json"
    found = json.loads(config.read_text("utf-8")).get("chat_template") if config.is_file() else None
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    if found is not None and not isinstance(found, str):
        raise ValueError(
            "chat_template of tokenizer_config.json is neither text nor a list of named templates"
        )
    return found
