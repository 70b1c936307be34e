"""The formats in which models write tool calls: a parser, and how a grammar writes the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from trunkline.server.tools.grammar import Frame, Parameter
from trunkline.server.tools.headed_calls import HeadedCalls, headed_call, numbered_call
from trunkline.server.tools.json_calls import JsonCalls, json_call
from trunkline.server.tools.mistral_calls import mistral
from trunkline.server.tools.parser import Program, Tool, ToolParser
from trunkline.server.tools.pythonic_calls import PythonicCalls, pythonic_call
from trunkline.server.tools.tagged_calls import TaggedCalls, tagged_call
from trunkline.text.harmony import CALL_END, CHANNEL, HARMONY_MARKS, MESSAGE, MESSAGE_END, START


@dataclass(frozen=True)
class ToolFormat:
    """`names`: what --tool-call-parser calls it. `hints`: texts of a chat template that tell it, for "auto"
    and among formats of one name; all must be there. `marks`: texts that must be seen in an output even where
    special tokens are left out."""

    names: tuple[str, ...]
    hints: tuple[str, ...]
    program: Program
    frame: Frame
    marks: tuple[str, ...] = ()

    def parser(self, tools: Sequence[Tool]) -> ToolParser:
        return ToolParser(self.program, tools)


def _dsml(tag: str) -> str:
    return f"｜DSML｜{tag}"


def _tag_key(parameter: Parameter) -> str:
    return f"<parameter={parameter.name}>\n"


_DEEPSEEK_BEGIN, _DEEPSEEK_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_DEEPSEEK_CALL, _DEEPSEEK_SEP, _DEEPSEEK_CALL_END = (
    "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
)  # fmt: skip
_DEEPSEEK_MARKS = (_DEEPSEEK_BEGIN, _DEEPSEEK_END, _DEEPSEEK_CALL, _DEEPSEEK_SEP, _DEEPSEEK_CALL_END)
_KIMI_BEGIN, _KIMI_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_KIMI_CALL, _KIMI_ARGUMENTS, _KIMI_CALL_END = (
    "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
)  # fmt: skip
_DSML_BEGIN, _DSML_END = f"<{_dsml('function_calls')}>", f"</{_dsml('function_calls')}>"

# "auto" takes the first whose hints are all in the template.
TOOL_FORMATS: tuple[ToolFormat, ...] = (
    ToolFormat(
        ("gpt-oss",),
        (CHANNEL, "commentary"),
        HeadedCalls(
            (START, CHANNEL),
            (MESSAGE,),
            re.compile(r".*?to=functions\.(?P<name>[\w.-]+).*", re.DOTALL),
            (CALL_END, MESSAGE_END),
        ),
        Frame(
            headed_call(
                lambda name: f"assistant{CHANNEL}commentary to=functions.{name} <|constrain|>json{MESSAGE}",
                "",
            ),
            before=START,
            single=True,
        ),
        HARMONY_MARKS,
    ),
    ToolFormat(
        ("deepseekv32",),
        (_dsml("invoke"),),
        TaggedCalls(
            f'<{_dsml("invoke")} name="',
            ('">',),
            f'<{_dsml("parameter")} name="',
            (('" string="true">', True), ('" string="false">', False), ('">', None)),
            f"</{_dsml('parameter')}>",
            f"</{_dsml('invoke')}>",
            (_DSML_BEGIN, _DSML_END),
        ),
        Frame(
            by_parameter=True,
            call=tagged_call(
                lambda name: f'<{_dsml("invoke")} name="{name}">\n',
                lambda p: f'<{_dsml("parameter")} name="{p.name}" string="{str(p.text).lower()}">',
                f"</{_dsml('parameter')}>",
                f"</{_dsml('invoke')}>\n",
                after_value="\n",
            ),
            before=f"{_DSML_BEGIN}\n",
            after=_DSML_END,
            trigger=_DSML_BEGIN,
        ),
    ),
    ToolFormat(
        ("deepseekv3",),
        (_DEEPSEEK_SEP, "```json"),
        HeadedCalls(
            (_DEEPSEEK_CALL,),
            ("```json",),
            re.compile(rf"\s*\w+{_DEEPSEEK_SEP}(?P<name>[^\n]+)\n\s*"),
            ("```", _DEEPSEEK_CALL_END),
            (_DEEPSEEK_BEGIN, _DEEPSEEK_END),
        ),
        Frame(
            headed_call(
                lambda name: f"{_DEEPSEEK_CALL}function{_DEEPSEEK_SEP}{name}\n```json\n",
                f"\n```{_DEEPSEEK_CALL_END}",
            ),
            before=_DEEPSEEK_BEGIN,
            separator="\n",
            after=_DEEPSEEK_END,
            trigger=_DEEPSEEK_BEGIN,
        ),
        _DEEPSEEK_MARKS,
    ),
    ToolFormat(
        ("deepseekv31",),
        (_DEEPSEEK_SEP,),
        HeadedCalls(
            (_DEEPSEEK_CALL,),
            (_DEEPSEEK_SEP,),
            re.compile(r"\s*(?P<name>\S+)\s*"),
            (_DEEPSEEK_CALL_END,),
            (_DEEPSEEK_BEGIN, _DEEPSEEK_END),
        ),
        Frame(
            headed_call(lambda name: f"{_DEEPSEEK_CALL}{name}{_DEEPSEEK_SEP}", _DEEPSEEK_CALL_END),
            before=_DEEPSEEK_BEGIN,
            after=_DEEPSEEK_END,
            trigger=_DEEPSEEK_BEGIN,
        ),
        _DEEPSEEK_MARKS,
    ),
    ToolFormat(
        ("kimi_k2",),
        (_KIMI_CALL,),
        HeadedCalls(
            (_KIMI_CALL,),
            (_KIMI_ARGUMENTS,),
            re.compile(r"\s*(?P<id>(?:functions\.)?(?P<name>[^\s:]+)(?::\d+)?)\s*"),
            (_KIMI_CALL_END,),
            (_KIMI_BEGIN, _KIMI_END),
        ),
        Frame(
            numbered_call(lambda name: f"{_KIMI_CALL}functions.{name}:", _KIMI_ARGUMENTS, _KIMI_CALL_END),
            before=_KIMI_BEGIN,
            after=_KIMI_END,
            trigger=_KIMI_BEGIN,
        ),
        (_KIMI_BEGIN, _KIMI_END, _KIMI_CALL, _KIMI_ARGUMENTS, _KIMI_CALL_END),
    ),
    ToolFormat(
        ("mistral",),
        ("[TOOL_CALLS]", "[ARGS]"),
        mistral,
        Frame(headed_call(lambda name: f"[TOOL_CALLS]{name}[ARGS]", ""), trigger="[TOOL_CALLS]"),
        ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    ),
    ToolFormat(
        ("mistral",),
        ("[TOOL_CALLS]",),
        mistral,
        Frame(json_call("", ""), before="[TOOL_CALLS] [", separator=", ", after="]", trigger="[TOOL_CALLS]"),
        ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    ),
    ToolFormat(
        ("qwen3_coder",),
        ("<function=", "<parameter="),
        TaggedCalls(
            "<function=",
            (">",),
            "<parameter=",
            ((">", None),),
            "</parameter>",
            "</function>",
            ("<tool_call>", "</tool_call>"),
            newlines=True,
        ),
        Frame(
            by_parameter=True,
            call=tagged_call(
                lambda name: f"<tool_call>\n<function={name}>\n",
                _tag_key,
                "</parameter>",
                "</function>\n</tool_call>",
                before_end="\n",
                after_value="\n",
            ),
            separator="\n",
            trigger="<tool_call>",
        ),
    ),
    ToolFormat(
        ("minimax-m2",),
        ("<minimax:tool_call>",),
        TaggedCalls(
            '<invoke name="',
            ('">',),
            '<parameter name="',
            (('">', None),),
            "</parameter>",
            "</invoke>",
            ("<minimax:tool_call>", "</minimax:tool_call>"),
        ),
        Frame(
            by_parameter=True,
            call=tagged_call(
                lambda name: f'<invoke name="{name}">\n',
                lambda p: f'<parameter name="{p.name}">',
                "</parameter>",
                "</invoke>\n",
                after_value="\n",
            ),
            before="<minimax:tool_call>\n",
            after="</minimax:tool_call>",
            trigger="<minimax:tool_call>",
        ),
    ),
    ToolFormat(
        ("glm47",),
        ("<arg_key>", "<arg_value>", "tool_call>{{tool.name}}<arg_key>"),
        TaggedCalls(
            "<tool_call>",
            ("<arg_key>", "</tool_call>"),
            "<arg_key>",
            (("</arg_key><arg_value>", None), ("</arg_key>\n<arg_value>", None)),
            "</arg_value>",
            "</tool_call>",
        ),
        Frame(
            by_parameter=True,
            call=tagged_call(
                lambda name: f"<tool_call>{name}",
                lambda p: f"<arg_key>{p.name}</arg_key><arg_value>",
                "</arg_value>",
                "</tool_call>",
            ),
            trigger="<tool_call>",
        ),
    ),
    ToolFormat(
        ("glm45", "glm"),
        ("<arg_key>", "<arg_value>"),
        TaggedCalls(
            "<tool_call>",
            ("<arg_key>", "</tool_call>"),
            "<arg_key>",
            (("</arg_key>\n<arg_value>", None), ("</arg_key><arg_value>", None)),
            "</arg_value>",
            "</tool_call>",
        ),
        Frame(
            by_parameter=True,
            call=tagged_call(
                lambda name: f"<tool_call>{name}\n",
                lambda p: f"<arg_key>{p.name}</arg_key>\n<arg_value>",
                "</arg_value>",
                "</tool_call>",
                after_value="\n",
            ),
            separator="\n",
            trigger="<tool_call>",
        ),
    ),
    ToolFormat(
        ("hermes", "qwen", "qwen25", "interns1"),
        ("<tool_call>",),
        JsonCalls(("<tool_call>",), ("</tool_call>",)),
        Frame(json_call("<tool_call>\n", "\n</tool_call>"), separator="\n", trigger="<tool_call>"),
        ("<tool_call>", "</tool_call>"),
    ),
    ToolFormat(
        ("hunyuan",),
        ("<tool_calls>",),
        JsonCalls(("<tool_calls>",), ("</tool_calls>",)),
        Frame(
            json_call("", ""),
            before="<tool_calls>\n[",
            separator=", ",
            after="]\n</tool_calls>",
            trigger="<tool_calls>",
        ),
        ("<tool_calls>", "</tool_calls>"),
    ),
    ToolFormat(
        ("lfm2",),
        ("<|tool_call_start|>",),
        PythonicCalls(("<|tool_call_start|>",), ("<|tool_call_end|>",)),
        Frame(
            pythonic_call(),
            by_parameter=True,
            before="<|tool_call_start|>[",
            separator=", ",
            after="]<|tool_call_end|>",
            trigger="<|tool_call_start|>",
        ),
        ("<|tool_call_start|>", "<|tool_call_end|>"),
    ),
    ToolFormat(
        ("pythonic",),
        ("[func_name1(",),
        PythonicCalls(("<|python_start|>",), ("<|python_end|>",)),
        Frame(pythonic_call(), by_parameter=True, before="[", separator=", ", after="]"),
        ("<|python_start|>", "<|python_end|>"),
    ),
    ToolFormat(
        ("llama3",),
        ('"parameters"', "<|eot_id|>"),
        JsonCalls(("<|python_tag|>",), ("<|eom_id|>",), at_start=True, known_only=True),
        Frame(json_call("", "", "parameters"), separator="; "),
        ("<|python_tag|>", "<|eom_id|>"),
    ),
    ToolFormat(
        ("json",),
        ('"name"', '"arguments"'),
        JsonCalls(("```json", "<tool_call>"), ("```", "</tool_call>"), at_start=True, known_only=True),
        Frame(json_call("", ""), separator="\n"),
        ("<tool_call>", "</tool_call>"),
    ),
)


def tool_format(name: str, template: str = "") -> ToolFormat | None:
    """By name; "auto": the one that the chat template tells. None for none. Raises KeyError."""
    told = (found for found in TOOL_FORMATS if all(hint in template for hint in found.hints))
    if name == "none":
        return None
    if name == "auto":
        return next(told, None)
    named = [found for found in TOOL_FORMATS if name in found.names]
    if not named:
        raise KeyError(name)
    return next((found for found in told if name in found.names), named[-1])


def parser_names() -> list[str]:
    """All names of formats, each once."""
    return list(dict.fromkeys(name for found in TOOL_FORMATS for name in found.names))
