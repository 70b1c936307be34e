"""Parsers of tool calls: what they read, and that where the text is cut makes no difference (P3, P4)."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from trunkline.config.flags import TOOL_CALL_PARSERS
from trunkline.server.tools.formats import TOOL_FORMATS, parser_names, tool_format
from trunkline.server.tools.parser import CallArguments, CallEnd, CallStart, Event, Tool, ToolParser
from trunkline.text.reasoning import REASONING_FORMATS

TOOLS = (
    Tool(
        "get_weather",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "units": {"enum": ["C", "F"]},
                "extra": {"type": "array"},
            },
        },
    ),
    Tool("add", {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}}),
    Tool("now"),
)
Call = tuple[str, Any]
W: Call = ("get_weather", {"city": "Paris", "days": 2})
A: Call = ("add", {"a": 1, "b": -2.5})
DS = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)
W_JSON, A_JSON = '{"city": "Paris", "days": 2}', '{"a": 1, "b": -2.5}'
CODER = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
    "</function>\n</tool_call>"
)
GLM = (
    "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>2</arg_value>\n</tool_call>"
)
HARMONY = f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{W_JSON}<|call|>"

# (parser, text, what is text in it, the calls)
GOOD: list[tuple[str, str, str, list[Call]]] = [
    ("hermes", f'<tool_call>\n{{"name": "get_weather", "arguments": {W_JSON}}}\n</tool_call>', "", [W]),
    (
        "hermes",
        f'I ask. <tool_call>{{"name": "get_weather", "arguments": {W_JSON}}}</tool_call>\n'
        f'<tool_call>{{"arguments": {A_JSON}, "name": "add"}}</tool_call>\n Done.',
        "I ask.Done.",
        [W, A],
    ),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", [("now", {})]),
    ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', "", [("now", {})]),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
        "",
        [("add", {"a": 1})],
    ),
    (
        "hermes",
        '<tool_call>{"name": "n\\u00e9", "arguments": {"x": ["}]", {"y": "\\""}]}}</tool_call>',
        "",
        [("né", {"x": ["}]", {"y": '"'}]})],
    ),
    ("qwen25", f'<tool_call>{{"id": 3, "name": "add", "arguments": {A_JSON}}}</tool_call>', "", [A]),
    ("llama3", f'{{"name": "get_weather", "parameters": {W_JSON}}}', "", [W]),
    (
        "llama3",
        f'<|python_tag|>{{"name": "get_weather", "parameters": {W_JSON}}}; '
        f'{{"name": "add", "parameters": {A_JSON}}}',
        "",
        [W, A],
    ),
    ("llama3", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {W_JSON}}}, '
        f'{{"name": "add", "arguments": {A_JSON}, "id": "abc"}}]',
        "",
        [W, A],
    ),
    (
        "mistral",
        f"Yes.[TOOL_CALLS]get_weather[ARGS]{W_JSON}[TOOL_CALLS]add[CALL_ID]x1[ARGS]{A_JSON}",
        "Yes.",
        [W, A],
    ),
    ("mistral", f"[TOOL_CALLS]add{A_JSON}", "", [A]),
    (
        "deepseekv3",
        f"Ok{DS[0]}{DS[1]}function{DS[2]}get_weather\n```json\n{W_JSON}\n```{DS[3]}\n"
        f"{DS[1]}function{DS[2]}add\n```json\n{A_JSON}\n```{DS[3]}{DS[4]}",
        "Ok",
        [W, A],
    ),
    (
        "deepseekv31",
        f"{DS[0]}{DS[1]}get_weather{DS[2]}{W_JSON}{DS[3]}{DS[1]}add{DS[2]}{A_JSON}{DS[3]}{DS[4]}",
        "",
        [W, A],
    ),
    (
        "kimi_k2",
        "Hm <|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        "<|tool_call_argument_begin|>"
        f"{W_JSON}<|tool_call_end|><|tool_call_begin|>functions.add:1<|tool_call_argument_begin|>{A_JSON}"
        "<|tool_call_end|><|tool_calls_section_end|>",
        "Hm",
        [W, A],
    ),
    ("pythonic", '[get_weather(city="Paris", days=2), add(a=1, b=-2.5)]', "", [W, A]),
    (
        "pythonic",
        "[now(), get_weather(city='a\\'b]', extra=[True, None, {'k': (1,)}])]",
        "",
        [("now", {}), ("get_weather", {"city": "a'b]", "extra": [True, None, {"k": [1]}]})],
    ),
    (
        "pythonic",
        '[get_weather(city="\\ud83d\\ude00", days=true)]',
        "",
        [("get_weather", {"city": "😀", "days": True})],
    ),
    ("pythonic", "[1, 2]", "[1, 2]", []),
    ("lfm2", "<|tool_call_start|>[add(a=1, b=-2.5)]<|tool_call_end|>Let me see.", "Let me see.", [A]),
    ("qwen3_coder", f"Go.\n{CODER}\n{CODER}", "Go.", [W, W]),
    ("qwen3_coder", "<tool_call>\n<function=now>\n</function>\n</tool_call>", "", [("now", {})]),
    (
        "qwen3_coder",
        '<function=get_weather><parameter=city>\n\na "b"\n\n</parameter></function>',
        "",
        [("get_weather", {"city": '\na "b"\n'})],
    ),
    (
        "minimax-m2",
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n'
        '<parameter name="days">2</parameter>\n</invoke>\n<invoke name="now"></invoke>\n</minimax:tool_call>',
        "",
        [W, ("now", {})],
    ),
    (
        "deepseekv32",
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" '
        'string="true">Paris</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
        "",
        [W],
    ),
    ("glm45", f"I see.\n{GLM}", "I see.", [W]),
    (
        "glm47",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value><arg_key>days</arg_key>"
        "<arg_value>2</arg_value></tool_call><tool_call>now</tool_call>",
        "",
        [W, ("now", {})],
    ),
    (
        "glm45",
        "<tool_call>other\n<arg_key>x</arg_key>\n<arg_value>[1, 'a']</arg_value>\n<arg_key>y</arg_key>\n"
        "<arg_value>a b</arg_value>\n</tool_call>",
        "",
        [("other", {"x": [1, "a"], "y": "a b"})],
    ),
    ("gpt-oss", HARMONY, "", [W]),
    ("gpt-oss", f"<|start|>assistant{HARMONY}", "", [W]),
    ("gpt-oss", f"<|start|>assistant to=functions.add<|channel|>commentary json<|message|>{A_JSON}", "", [A]),
    ("hunyuan", f'<tool_calls>\n[{{"name": "get_weather", "arguments": {W_JSON}}}]\n</tool_calls>', "", [W]),
    (
        "json",
        f'{{"name": "add", "arguments": {A_JSON}}}\n{{"name": "now", "arguments": {{}}}}',
        "",
        [A, ("now", {})],
    ),
    ("json", f'Here:\n```json\n[{{"name": "add", "arguments": {A_JSON}}}]\n```', "Here:", [A]),
    ("json", '{"answer": 42}', '{"answer": 42}', []),
]

# What is no call stays text; what breaks off inside of its arguments stays a call.
BROKEN = [
    ("hermes", '<tool_call>{"name"'),
    ("hermes", "<tool_call>{broken</tool_call> and < more"),
    ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call><tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1]}</tool_call> tail'),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": "unfinished \\'),
    ("hermes", "a <tool_cal b </tool_call>  "),
    ("llama3", '{"name": "unknown", "parameters": {}}'),
    ("llama3", '{"name": "add", "parameters": {"a": 1}}; then text'),
    ("mistral", '[TOOL_CALLS] [{"name": "add"'),
    ("mistral", "[TOOL_CALLS]add[ARGS]"),
    ("mistral", "[TOOL_CALLS]" + "x" * 600 + "[ARGS]{}"),
    ("deepseekv3", f"{DS[0]}{DS[1]}function{DS[2]}f{DS[3]}{DS[4]} x"),
    ("deepseekv31", f"{DS[0]} nothing {DS[4]}"),
    ("kimi_k2", "<|tool_call_begin|>functions.a b:0<|tool_call_argument_begin|>{}"),
    ("pythonic", "[add(a=1), unknown()]"),
    ("pythonic", "[add(a=1"),
    ("pythonic", "[add(1)]"),
    ("pythonic", "[" * 80 + "]" * 80),
    ("pythonic", "[add(a=__import__('os'))]"),
    ("qwen3_coder", "<tool_call> hi </tool_call>"),
    ("qwen3_coder", "<tool_call><function=f><parameter=a>x"),
    ("qwen3_coder", "<tool_call><function=f><parameter=a"),
    ("glm45", "<tool_call>a<b</tool_call>"),
    ("glm45", "<tool_call>f\n<arg_key>k</arg_key> oops"),
    ("gpt-oss", "<|channel|>final<|message|>Hello"),
    ("gpt-oss", "<|channel|>commentary to=python<|message|>1+1<|call|>"),
    ("json", "```json\n{}\n```"),
    ("json", ""),
    ("json", "   "),
]
TEXTS = [(name, text) for name, text, _, _ in GOOD] + BROKEN


def parse(name: str, pieces: list[str]) -> list[Event]:
    found = tool_format(name)
    assert found is not None
    parser = found.parser(TOOLS)
    return [event for piece in pieces for event in parser.feed(piece)] + parser.flush()


def joined(events: list[Event]) -> list[Any]:
    """Neighboring pieces put together."""
    parts: list[Any] = []
    for event in events:
        if parts and isinstance(event, str) and isinstance(parts[-1], str):
            parts[-1] += event
        elif parts and isinstance(event, CallArguments) and isinstance(parts[-1], CallArguments):
            parts[-1] = CallArguments(parts[-1].text + event.text)
        else:
            parts.append(event)
    return parts


def calls_of(events: list[Event]) -> list[Call]:
    parts = joined(events)
    starts = [i for i, part in enumerate(parts) if isinstance(part, CallStart)]
    assert all(isinstance(parts[i + 1], CallArguments) and parts[i + 2] == CallEnd() for i in starts)
    return [(parts[i].name, json.loads(parts[i + 1].text)) for i in starts]


@pytest.mark.parametrize(("name", "text", "plain", "calls"), GOOD)
def test_calls(name: str, text: str, plain: str, calls: list[Call]) -> None:
    events = parse(name, [text])
    assert calls_of(events) == calls
    assert "".join(event for event in events if isinstance(event, str)) == plain


@pytest.mark.parametrize(("name", "text"), TEXTS)
def test_where_the_text_is_cut_makes_no_difference(name: str, text: str) -> None:
    whole = joined(parse(name, [text]))
    cuts = [[text[:i], text[i:]] for i in range(len(text) + 1)]
    rng = random.Random(7)
    for _ in range(20):
        ends = sorted(rng.sample(range(len(text) + 1), min(5, len(text) + 1)))
        cuts.append([text[a:b] for a, b in itertools.pairwise([0, *ends, len(text)])])
    for pieces in [list(text), *cuts]:
        assert joined(parse(name, pieces)) == whole, pieces


@pytest.mark.parametrize(("name", "text"), BROKEN)
def test_nothing_of_what_is_no_call_is_lost(name: str, text: str) -> None:
    parts = joined(parse(name, [text]))
    if not any(isinstance(part, CallStart) for part in parts):
        assert parts == ([text] if text else [])
        return
    seen = "".join(part if isinstance(part, str) else getattr(part, "text", "") for part in parts)
    for word in ("unfinished", "tail", "then text", "oops", "]"):
        assert (word in text) <= (word in seen)


def test_every_mark_inside_of_every_text_leaves_a_parser_that_ends() -> None:
    rng = random.Random(3)
    words = sorted({word for _, text in TEXTS for word in (text[:12], text[-9:], text[3:20])})
    for found in TOOL_FORMATS:
        for _ in range(60):
            text = "".join(rng.choices([*words, *found.marks, *found.hints], k=6))
            whole = joined(parse(found.names[0], [text]))
            assert joined(parse(found.names[0], list(text))) == whole


def test_arguments_stream_as_they_come() -> None:
    found = tool_format("hermes")
    assert found is not None
    parser = found.parser(TOOLS)
    assert parser.feed('<tool_call>{"name": "get_weather", "arguments": ') == []
    assert parser.feed('{"ci') == [CallStart("get_weather"), CallArguments('{"ci')]
    assert parser.feed('ty": "Pa') == [CallArguments('ty": "Pa')]
    assert parser.feed('ris"}') == [CallArguments('ris"}')]
    assert parser.feed("}</tool_call>") == [CallEnd()]
    assert parser.flush() == []


@pytest.mark.parametrize("name", ["qwen3_coder", "glm45"])
def test_text_parameters_stream_as_they_come(name: str) -> None:
    found = tool_format(name)
    assert found is not None
    parser = found.parser(TOOLS)
    begin = {"qwen3_coder": "<function=get_weather><parameter=city>", "glm45": GLM[: GLM.index("Paris")]}[
        name
    ]
    parser.feed(begin)
    assert parser.feed('a "b') == [CallArguments('"a \\"b')]
    assert parser.feed(" c") == [CallArguments(" c")]


def test_own_ids_are_kept() -> None:
    text = next(text for name, text, _, _ in GOOD if name == "kimi_k2")
    ids = [event.id for event in parse("kimi_k2", [text]) if isinstance(event, CallStart)]
    assert ids == ["functions.get_weather:0", "functions.add:1"]


def test_the_guide_knows_all_formats() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "tools.md").read_text("utf-8")
    assert [name for name in (*parser_names(), *REASONING_FORMATS) if f"`{name}`" not in guide] == []


def test_names_on_the_command_line() -> None:
    assert ("auto", "none", *parser_names()) == TOOL_CALL_PARSERS
    assert tool_format("none") is None and tool_format("auto", "plain") is None
    with pytest.raises(KeyError):
        tool_format("other")


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("x <tool_call> y", "hermes"),
        ("<tool_call> <function= <parameter=", "qwen3_coder"),
        ("[TOOL_CALLS] x [ARGS]", "mistral"),
        ("<|channel|> commentary", "gpt-oss"),
        ('{"name": f, "parameters": p} <|eot_id|>', "llama3"),
        (f"{DS[2]} ```json", "deepseekv3"),
        (DS[2], "deepseekv31"),
    ],
)
def test_auto_reads_the_template(template: str, name: str) -> None:
    found = tool_format("auto", template)
    assert found is not None and name in found.names


def test_a_long_name_costs_no_more_than_its_length() -> None:
    parser = ToolParser(TOOL_FORMATS[0].program, TOOLS)
    for _ in range(2000):
        parser.feed("<|channel|>")
    assert isinstance(parser.flush(), list)
