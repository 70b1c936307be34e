"""What grammars for tool calls let through is what the same format's parser reads: random outputs of each."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from trunkline.engine.constraint import Constraint
from trunkline.engine.fields import read_fields
from trunkline.grammar.llguidance import LlguidanceBackend
from trunkline.server.fields import CHAT_FIELDS
from trunkline.server.tools.choice import ToolPlan, plan_tools
from trunkline.server.tools.formats import TOOL_FORMATS, ToolFormat, tool_format
from trunkline.server.tools.parser import CallArguments, CallStart, Event
from trunkline.text.detokenizer import Detokenizer
from trunkline.text.tokenizer import Tokenizer
from trunkline.types import GrammarSpec, RequestError

PLAN = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Oslo"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 99},
        "note": {"type": "string"},
        "exact": {"type": "boolean"},
        "parts": {"type": "array", "items": {"enum": [1, None, "x"]}, "maxItems": 2},
    },
    "required": ["city", "note"],
    "additionalProperties": False,
}
OPTIONAL = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}, "b": {"type": "boolean"}},
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "plan_trip", "parameters": PLAN}},
    {"type": "function", "function": {"name": "switch", "parameters": OPTIONAL}},
    {"type": "function", "function": {"name": "now"}},
]
SCHEMAS = {"plan_trip": PLAN, "switch": OPTIONAL, "now": {"type": "object", "maxProperties": 0}}
SPECIAL = sorted({mark for found in TOOL_FORMATS for mark in found.marks} - {"<tool_call>", "</tool_call>"})


@pytest.fixture(scope="module")
def vocabulary() -> Tokenizer:
    """Bytes, some words, and the marks of all formats as special tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>", *SPECIAL],
        show_progress=False,
    )
    backend.train_from_iterator(['{"name": "arguments": "parameters": function parameter'] * 3, trainer)
    backend.add_tokens([AddedToken(tag, special=False) for tag in ("<tool_call>", "</tool_call>")])
    return Tokenizer(backend, {})


@pytest.fixture(scope="module")
def compiler(vocabulary: Tokenizer) -> LlguidanceBackend:
    return LlguidanceBackend(vocabulary, [0])


def plan_of(found: ToolFormat, **fields: Any) -> ToolPlan:
    checked = read_fields(CHAT_FIELDS, {"tools": TOOLS, **fields})
    response_format = checked.pop("response_format", None)
    return plan_tools(checked, found, response_format)


def walk(
    compiler: LlguidanceBackend, vocabulary: Tokenizer, spec: GrammarSpec, ends: list[str], rng: random.Random
) -> list[int]:
    """A random output of a grammar; `ends` are tried often, so that free text ends."""
    matcher = compiler.compile(spec).matcher()
    row = np.zeros((vocabulary.num_tokens + 31) // 32, np.int32)
    out: list[int] = []
    while len(out) < 3000:
        matcher.fill_mask(row)
        bits = np.unpackbits(row.view(np.uint8), bitorder="little")[: vocabulary.num_tokens]
        allowed = np.flatnonzero(bits)
        assert len(allowed)
        forced = matcher.forced()
        assert not forced or bits[forced[0]], "what is forced is allowed"
        if bits[0] and rng.random() < 0.4:
            return out
        if len(allowed) > 20 and rng.random() < 0.3:
            for token in vocabulary.encode(rng.choice(ends), add_special_tokens=False):
                if not matcher.accept(token):
                    break
                out.append(token)
            continue
        token = int(rng.choice([t for t in allowed if t] or [0]))
        assert matcher.accept(token)
        if token == 0:
            return out
        out.append(token)
    raise AssertionError("the output does not end")


def read(vocabulary: Tokenizer, found: ToolFormat, plan: ToolPlan, out: list[int]) -> tuple[str, list[Event]]:
    text = Detokenizer(vocabulary, shown=vocabulary.special_ids_of(found.marks)).decode(out)
    parser = found.parser(plan.tools)
    return text, parser.feed(text) + parser.flush()


def calls_of(events: list[Event]) -> list[tuple[str, Any]]:
    calls: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, CallStart):
            calls.append((event.name, ""))
        elif isinstance(event, CallArguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    return [(name, json.loads(text)) for name, text in calls]


ENDS = ['"', "}", ")", "]", ">", "</parameter>", "\n</parameter>", "</arg_value>", "</｜DSML｜parameter>"]
ALL = pytest.mark.parametrize(
    "found", TOOL_FORMATS, ids=lambda found: "-".join([found.names[0], found.hints[-1][:9]])
)


@ALL
def test_required_calls_are_read_and_valid(
    compiler: LlguidanceBackend, vocabulary: Tokenizer, found: ToolFormat
) -> None:
    plan = plan_of(found, tool_choice="required")
    assert plan.constraint is not None
    rng = random.Random(11)
    names, most = set(), 0
    for _ in range(12):
        text, events = read(
            vocabulary, found, plan, walk(compiler, vocabulary, plan.constraint.spec, ENDS, rng)
        )
        calls = calls_of(events)
        assert calls and not any(isinstance(event, str) for event in events), text
        for name, arguments in calls:
            jsonschema.validate(arguments, SCHEMAS[name])
        names |= {name for name, _ in calls}
        most = max(most, len(calls))
    assert names == SCHEMAS.keys()
    assert (most > 1) != found.frame.single


@ALL
def test_a_named_call_is_the_only_one(
    compiler: LlguidanceBackend, vocabulary: Tokenizer, found: ToolFormat
) -> None:
    plan = plan_of(found, tool_choice={"type": "function", "function": {"name": "switch"}})
    assert plan.constraint is not None
    for seed in range(4):
        out = walk(compiler, vocabulary, plan.constraint.spec, ENDS, random.Random(seed))
        ((name, arguments),) = calls_of(read(vocabulary, found, plan, out)[1])
        assert name == "switch"
        jsonschema.validate(arguments, OPTIONAL)


@ALL
def test_calls_in_free_text(compiler: LlguidanceBackend, vocabulary: Tokenizer, found: ToolFormat) -> None:
    """tool_choice auto with parallel_tool_calls false: text, then at most one call."""
    if not found.frame.trigger:
        with pytest.raises(RequestError) as refused:
            plan_of(found, parallel_tool_calls=False)
        assert refused.value.param == "parallel_tool_calls"
        return
    plan = plan_of(found, parallel_tool_calls=False)
    assert plan.constraint is not None
    counts = set()
    for seed in range(16):
        ends = [found.frame.trigger, *ENDS]
        out = walk(compiler, vocabulary, plan.constraint.spec, ends, random.Random(seed))
        counts.add(len(calls_of(read(vocabulary, found, plan, out)[1])))
    assert counts == {0, 1}


def test_strict_holds_for_the_tool_that_asks_for_it(
    compiler: LlguidanceBackend, vocabulary: Tokenizer
) -> None:
    found = tool_format("hermes")
    assert found is not None
    strict = [{"type": "function", "function": {"name": "switch", "parameters": OPTIONAL, "strict": True}}]
    loose = [{"type": "function", "function": {"name": "other", "parameters": {"type": "object", "$id": 3}}}]
    plan = plan_of(found, tools=strict + loose)
    assert plan.constraint is not None
    compiled = compiler.compile(plan.constraint.spec)

    def allowed(text: str) -> bool:
        matcher = compiled.matcher()
        return all(matcher.accept(t) for t in vocabulary.encode(text, add_special_tokens=False))

    begin = 'So: <tool_call>\n{"name": '
    assert allowed(begin + '"switch", "arguments": {"a": true}}\n</tool_call> and so on')
    assert not allowed(begin + '"switch", "arguments": {"c"')
    assert allowed(begin + '"other", "arguments": {"c": [1]}}\n</tool_call>')
    assert not allowed(begin + '"else"')


def test_an_answer_format_beside_tools_leaves_both(
    compiler: LlguidanceBackend, vocabulary: Tokenizer
) -> None:
    found = tool_format("hermes")
    assert found is not None
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": OPTIONAL}}
    plan = plan_of(found, response_format=schema)
    assert plan.constraint is not None
    kinds = set()
    for seed in range(12):
        out = walk(compiler, vocabulary, plan.constraint.spec, ENDS, random.Random(seed))
        text, events = read(vocabulary, found, plan, out)
        calls = calls_of(events)
        if not calls:
            jsonschema.validate(json.loads(text), OPTIONAL)
        kinds.add(bool(calls))
    assert kinds == {True, False}


def test_errors_name_the_tool() -> None:
    found = tool_format("hermes")
    assert found is not None
    for fields in ({"tool_choice": "required"}, {"parallel_tool_calls": False}):
        constraint = plan_of(found, **fields).constraint
        assert isinstance(constraint, Constraint)
        form = json.loads(constraint.spec.source)["format"]
        assert form["tags"][1]["begin"].endswith('"switch", "arguments": ')
        pointer = "/format/tags/1/content/json_schema/properties/a"
        assert constraint.locate(pointer) == ("tools[1].function.parameters", "/properties/a")
    named = plan_of(found, tool_choice={"type": "function", "function": {"name": "now"}}).constraint
    assert named is not None
    assert named.locate("/format/tags/0/content/json_schema") == ("tools[2].function.parameters", "")
    section = tool_format("mistral")
    assert section is not None
    constraint = plan_of(section, tool_choice="required").constraint
    assert constraint is not None
    assert (
        constraint.locate("/format/content/tags/0/content/json_schema/x")[0] == "tools[0].function.parameters"
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": 3}, "tool_choice"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools[3].function.name"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ],
)
def test_what_contradicts_itself_is_refused(fields: dict[str, Any], param: str) -> None:
    found = tool_format("hermes")
    assert found is not None
    with pytest.raises(RequestError) as refused:
        plan_of(found, **fields)
    assert refused.value.param == param


def test_what_a_format_cannot_hold_is_refused() -> None:
    coder = tool_format("qwen3_coder")
    assert coder is not None
    patterned = {"type": "object", "properties": {"a": {"type": "string", "minLength": 3}}}
    for parameters in (patterned, {"anyOf": [{"type": "object"}]}):
        tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
        with pytest.raises(RequestError) as refused:
            plan_of(coder, tools=tools, tool_choice="required")
        assert refused.value.param == "tools"
    with pytest.raises(RequestError) as refused:
        plan_tools(read_fields(CHAT_FIELDS, {"tools": TOOLS, "tool_choice": "required"}), None, None)
    assert refused.value.code == "no_tool_parser"


def test_some_allowed_tools(compiler: LlguidanceBackend, vocabulary: Tokenizer) -> None:
    found = tool_format("hermes")
    assert found is not None
    names = [{"type": "function", "function": {"name": name}} for name in ("now", "switch")]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": names}}
    plan = plan_of(found, tool_choice=choice)
    assert plan.constraint is not None and plan.shown == TOOLS
    assert "plan_trip" not in plan.constraint.spec.source
