"""Reasoning and answer told apart in a model's text: formats of model families, and a splitter of streams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from trunkline.text.cursor import Cursor, Waiting
from trunkline.text.harmony import HARMONY_MARKS, MESSAGE_END, harmony
from trunkline.types import RequestError


@dataclass(frozen=True)
class ReasoningFormat:
    """How a family writes its reasoning.

    `always`: an output is reasoning from its first character unless the prompt has ended it, with `begin` or
    without. `breaks`: marks of tool calls that end reasoning too. `harmony`: messages on channels instead of
    tags; `end` is what ends the first of them. `hints`: texts of a chat template that tell this format, for
    "auto"; all of a group must be there.
    """

    begin: str
    end: str
    always: bool = False
    breaks: tuple[str, ...] = ()
    harmony: bool = False
    hints: tuple[tuple[str, ...], ...] = ()

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that must be seen in the output even where special tokens are left out."""
        return HARMONY_MARKS if self.harmony else (self.begin, self.end)


THINK_BEGIN, THINK_END = "<think>", "</think>"
_OPTIONAL = ReasoningFormat(THINK_BEGIN, THINK_END)
_ALWAYS = ReasoningFormat(THINK_BEGIN, THINK_END, always=True)
_KIMI_CALLS = ("<|tool_calls_section_begin|>",)

# "auto" takes the first whose hints are in the template.
REASONING_FORMATS: Mapping[str, ReasoningFormat] = MappingProxyType(
    {
        "gpt-oss": ReasoningFormat(
            "<|channel|>analysis<|message|>", MESSAGE_END, harmony=True, hints=(("<|channel|>", "analysis"),)
        ),
        "kimi_k2": ReasoningFormat(
            THINK_BEGIN, THINK_END, breaks=_KIMI_CALLS, hints=((THINK_END, *_KIMI_CALLS),)
        ),
        "kimi": ReasoningFormat("◁think▷", "◁/think▷", always=True, hints=(("◁think▷",),)),
        "mistral": ReasoningFormat("[THINK]", "[/THINK]", hints=(("[THINK]",),)),
        "qwen3": ReasoningFormat(THINK_BEGIN, THINK_END, hints=((THINK_END, "enable_thinking"),)),
        "deepseek-v3": ReasoningFormat(THINK_BEGIN, THINK_END, hints=((THINK_END, "thinking is defined"),)),
        "deepseek-r1": ReasoningFormat(
            THINK_BEGIN, THINK_END, always=True, hints=((THINK_END, "<｜Assistant｜>"),)
        ),
        "qwen3-thinking": ReasoningFormat(THINK_BEGIN, THINK_END, always=True, hints=((THINK_BEGIN,),)),
        "glm45": _OPTIONAL,
        "interns1": _OPTIONAL,
        "nemotron_3": _OPTIONAL,
        "minimax": _ALWAYS,
        "step3": _ALWAYS,
    }
)


def reasoning_format(name: str, template: str = "") -> ReasoningFormat | None:
    """By name; "auto": the one that the chat template tells, None for none. Raises KeyError."""
    if name == "none":
        return None
    if name != "auto":
        return REASONING_FORMATS[name]
    for found in REASONING_FORMATS.values():
        if any(all(hint in template for hint in group) for group in found.hints):
            return replace(found, always=False)  # the prompt shows whether an output begins inside
    return None


def name_of(found: ReasoningFormat) -> str:
    """The name of a format that `reasoning_format` gave."""
    return next(name for name, own in REASONING_FORMATS.items() if replace(own, always=found.always) == found)


@dataclass(frozen=True)
class Reasoning:
    """What is known of the reasoning in a request's output. `inside`: it begins with it. `gates`: a grammar
    holds only for what follows. `separate`: it is told apart from the answer, without its tags."""

    format: ReasoningFormat
    inside: bool = False
    gates: bool = False
    separate: bool = True


class ReasoningSplitter:
    """Splits by a format; where the text is cut makes no difference. Tags are dropped, and so is white space
    around reasoning, unless the reasoning is not `separate`: then it is kept as it is, with its tags."""

    def __init__(self, reasoning: Reasoning) -> None:
        self._format = reasoning.format
        self._keep = not reasoning.separate
        self._inside = reasoning.inside
        self._cursor = Cursor()
        self._thought: list[str] = []
        self._answer: list[str] = []
        self._spaces = ""
        self._done = False
        self.thinking = reasoning.inside
        parse = self._messages() if self._format.harmony else self._tags()
        self._parse: Waiting[None] | None = parse

    def feed(self, text: str) -> tuple[str, str]:
        if self._parse is None:
            return "", text
        self._cursor.push(text)
        return self._advance()

    def flush(self) -> tuple[str, str]:
        if self._parse is None:
            return "", ""
        self._cursor.end()
        return self._advance()

    def _advance(self) -> tuple[str, str]:
        assert self._parse is not None
        if next(self._parse, self) is self:  # it has come to its end: the rest is answer
            self._parse = None
            self._answer.append(self._cursor.rest())
        parts = "".join(self._thought), "".join(self._answer)
        self._thought.clear()
        self._answer.clear()
        return parts

    def _tags(self) -> Waiting[None]:
        cursor = self._cursor
        cursor.hold()
        yield from cursor.blanks()
        begun = yield from cursor.take(self._format.begin)
        start = cursor.release()
        if not begun and not self._inside:
            self._answer.append(start)
            return
        self.thinking = True
        if self._keep or not begun:
            self._think(start)
        mark = yield from cursor.until((self._format.end, *self._format.breaks), self._think)
        self.thinking = False
        if not mark:
            self._thought.append(self._spaces)
        elif self._keep:
            (self._thought if mark == self._format.end else self._answer).append(mark)
        elif mark == self._format.end:
            yield from cursor.blanks()
        else:
            self._answer.append(mark)

    def _think(self, text: str) -> None:
        """White space at both ends of reasoning goes."""
        if self._keep:
            self._thought.append(text)
            return
        shown = self._spaces + text if self._done else text.lstrip()
        visible = shown.rstrip()
        self._spaces = shown[len(visible) :]
        if visible:
            self._done = True
            self._thought.append(visible)

    def _messages(self) -> Waiting[None]:
        def thinking(now: bool) -> None:
            self.thinking = now

        sinks = (self._answer.append, self._answer.append) if self._keep else (
            self._thought.append, self._answer.append
        )  # fmt: skip
        yield from harmony(self._cursor, *sinks, thinking, raw=self._keep)


class ReasoningMeter:
    """Counts the tokens of reasoning, its tags among them."""

    def __init__(self, reasoning: Reasoning) -> None:
        self._splitter = ReasoningSplitter(reasoning)
        self.tokens = 0

    def feed(self, text: str) -> None:
        """The text of one token."""
        before = self._splitter.thinking
        self._splitter.feed(text)
        self.tokens += before or self._splitter.thinking


def split_reasoning(text: str, name: str, param: str = "reasoning_parser") -> tuple[str, str]:
    """(reasoning, answer) of a whole text, of which the prompt may have held the opening tag. Raises
    RequestError naming `param` for an unknown format."""
    if name not in REASONING_FORMATS:
        raise RequestError(
            f"{param} is {name[:100]!r}; it must be one of {', '.join(REASONING_FORMATS)}",
            code="invalid_value",
            param=param,
        )
    found = REASONING_FORMATS[name]
    ends, begins = text.find(found.end), text.find(found.begin)
    inside = not found.harmony and ends >= 0 and not 0 <= begins < ends
    lead = "" if inside or found.harmony or begins < 0 else text[:begins]
    splitter = ReasoningSplitter(Reasoning(found, inside=inside))
    first, last = splitter.feed(text[len(lead) :]), splitter.flush()
    return first[0] + last[0], lead + first[1] + last[1]
