"""Any schema from a generator gives output that validates, and hostile grammars cost only their sender."""

from __future__ import annotations

import json
import os
import random
import re
import threading
import time
from concurrent.futures import wait
from decimal import Decimal
from typing import Any

import jsonschema
import psutil
import pytest

from tests.pure.grammar.support import accepts, allowed, backend, compile_, eos_id, sample, tokenizer
from trunkline.grammar import sandbox as sandbox_module
from trunkline.grammar.automaton import Automaton
from trunkline.grammar.compiler import GrammarCompiler, backend_compiler
from trunkline.grammar.json_text import Layout
from trunkline.grammar.numbers import NumberRange, plain_text
from trunkline.grammar.protocol import Grammar, GrammarError, GrammarSpec
from trunkline.grammar.regex import match_language, search_language
from trunkline.grammar.sandbox import Sandbox


class Schemas:
    """Random schemas, biased towards keywords that meet each other."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def schema(self, depth: int = 3) -> Any:
        rng = self._random
        kind = rng.choice(
            ["string", "integer", "number", "array", "object", "object", "enum", "mixed", "logic"]
        )
        if depth == 0 and kind in ("array", "object", "logic"):
            kind = "integer"
        schema: dict[str, Any] = getattr(self, f"_{kind}")(depth)
        if depth and rng.random() < 0.15:
            schema = {"allOf": [schema, self._weak(depth - 1)]}
        return schema

    def _weak(self, depth: int) -> Any:
        """Something that most values meet."""
        rng = self._random
        return rng.choice(
            [
                {"maxLength": 9},
                {"minimum": -50},
                {"maxItems": 4},
                {"not": {"const": rng.randint(0, 5)}},
                {"properties": {"a": self.schema(depth)}},
                {"maxProperties": 4},
                {"dependentRequired": {"a": ["b"]}},
                {"if": {"required": ["a"]}, "then": {"required": ["c"]}},
                {"propertyNames": {"maxLength": 5}},
                True,
            ]
        )

    def _string(self, depth: int) -> Any:
        rng = self._random
        bounds = rng.choice(
            [{}, {"minLength": 2}, {"maxLength": 6}, {"pattern": rng.choice(["^a", "b$", "[0-9]+", "x|y"])}]
        )
        extra = (
            rng.choice([{}, {}, {"format": rng.choice(["date", "ipv4", "uuid"])}])
            if "pattern" not in bounds
            else {}
        )
        return {"type": "string", **({} if extra else bounds), **extra}

    def _integer(self, depth: int) -> Any:
        rng = self._random
        low = rng.randint(-40, 40)
        bounds = rng.choice(
            [
                {},
                {"minimum": low},
                {"minimum": low, "maximum": low + 25},
                {"multipleOf": rng.choice([2, 3, 5])},
            ]
        )
        return {"type": "integer", **bounds}

    def _number(self, depth: int) -> Any:
        rng = self._random
        low = rng.randint(-40, 40) / 4
        return {
            "type": "number",
            **rng.choice([{}, {"exclusiveMinimum": low}, {"minimum": low, "exclusiveMaximum": low + 1}]),
        }

    def _array(self, depth: int) -> Any:
        rng = self._random
        item = self.schema(depth - 1)
        extra: Any = rng.choice(
            [
                {"items": item},
                {"items": item, "minItems": 1, "maxItems": 3},
                {"prefixItems": [item, self.schema(depth - 1)], "items": False},
                {"items": {"enum": [1, 2, 3]}, "uniqueItems": True, "minItems": 1},
                {
                    "items": {"type": "integer", "minimum": 0, "maximum": 9},
                    "contains": {"const": 7},
                    "maxItems": 4,
                },
            ]
        )
        return {"type": "array", **extra}

    def _object(self, depth: int) -> Any:
        rng = self._random
        names = rng.sample(["a", "b", "c", "key one", '\u00e9"x'], rng.randint(1, 4))
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {name: self.schema(depth - 1) for name in names},
        }
        schema["required"] = [name for name in names if rng.random() < 0.5]
        if rng.random() < 0.6:
            schema["additionalProperties"] = rng.choice([False, {"type": "null"}])
        if rng.random() < 0.2:
            schema["patternProperties"] = {"^k": {"type": ["string", "integer"]}}
        return schema

    def _enum(self, depth: int) -> Any:
        return {"enum": self._random.sample([1, "x", None, 2.5, {"a": [1]}, ["b"], True, "\u00e9"], 3)}

    def _mixed(self, depth: int) -> Any:
        return {"type": self._random.sample(["string", "integer", "null", "boolean"], 2)}

    def _logic(self, depth: int) -> Any:
        parts = [self.schema(depth - 1) for _ in range(self._random.randint(2, 3))]
        return {self._random.choice(["anyOf", "oneOf"]): parts}


@pytest.mark.parametrize("block", range(8))
def test_random_schemas_give_valid_output(block: int) -> None:
    tested = refused = 0
    for seed in range(block * 25, block * 25 + 25):
        schema = Schemas(seed).schema()
        try:
            grammar = compile_("json_schema", schema)
        except GrammarError as error:
            assert error.code in ("unsupported_grammar", "invalid_grammar"), (error.message, schema)
            refused += 1
            continue
        check = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
        for draw in range(4):
            text = sample(grammar, seed * 10 + draw, jump=draw % 2 == 1)
            if text is not None:
                tested += 1
                value = json.loads(text)
                assert check.is_valid(value), (schema, text)
                assert accepts(grammar, text)
    assert refused < 10
    assert tested > 30


def mutated(value: Any, rng: random.Random) -> Any:
    """The value with one small change somewhere."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(sorted(value))
        rest = {name: inner for name, inner in value.items() if name != key}
        return rng.choice(
            [rest, {**rest, key: mutated(value[key], rng)}, {**value, "b": "x"}, {"c": 1, **value}]
        )
    if isinstance(value, list) and value and rng.random() < 0.8:
        index = rng.randrange(len(value))
        inner = mutated(value[index], rng)
        return rng.choice(
            [value[:index] + value[index + 1 :], [*value[:index], inner, *value[index + 1 :]], value * 2]
        )
    if isinstance(value, int) and not isinstance(value, bool):
        return value + rng.choice([-1, 1, 5])
    if isinstance(value, str) and value:
        return rng.choice([value[:-1], value + "b", "a" + value])
    return rng.choice([None, 0, 7, "a", 1.5, [], {}, True])


@pytest.mark.parametrize("block", range(4))
def test_values_are_accepted_if_and_only_if_they_are_valid(block: int) -> None:
    """Outputs, and outputs with one change, in the spelling of `json.dumps`."""
    agreed = [0, 0]
    for seed in range(5000 + block * 25, 5025 + block * 25):
        schema = Schemas(seed).schema()
        try:
            grammar = compile_("json_schema", schema)
        except GrammarError:
            continue
        check = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
        rng = random.Random(seed)
        for draw in range(3):
            text = sample(grammar, seed * 10 + draw)
            value = json.loads(text) if text is not None else None
            for _ in range(4):
                spelled = json.dumps(value, ensure_ascii=False)
                if not re.search(r"[0-9]e[+-]?[0-9]|[0-9.]{16}|\\ud[89ab]|-0", spelled):
                    expected = check.is_valid(value)
                    assert accepts(grammar, spelled) == expected, (schema, spelled)
                    agreed[expected] += 1
                value = mutated(value, rng)
    assert min(agreed) > 30


def test_any_json_object() -> None:
    grammar = compile_("json_object", "")
    for seed in range(10):
        text = sample(grammar, seed)
        assert text is None or isinstance(json.loads(text), dict)
    assert accepts(grammar, '{"a": [1, {"b": null}, "\\u00e9\\ud83d\\ude00"]}')
    assert not accepts(grammar, '{"a": "\\ud83d"}')
    assert not accepts(grammar, "[]")


# ------------------------------------------------------------------ parts
PATTERNS = (
    "^a+b?$",
    "foo",
    "(^|x)a",
    "a|^$",
    "[^a-c]+$",
    r"^[\w.-]+@x\.y$",
    "a{2,}",
    "(ab|cd){1,2}b",
    "x*?y",
    r"\.\d",
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_mean_what_they_mean_elsewhere(pattern: str) -> None:
    rng = random.Random(pattern)
    automaton = Automaton()
    for _ in range(300):
        text = "".join(rng.choice("abcdxy@.1fo") for _ in range(rng.randint(0, 7)))
        assert automaton.accepts(search_language(pattern), text) == bool(re.search(pattern, text)), text
        assert automaton.accepts(match_language(pattern), text) == bool(re.fullmatch(pattern, text)), text


def test_number_ranges() -> None:
    rng = random.Random(1)
    for _ in range(150):
        low, high = (
            rng.choice([None, Decimal(rng.randint(-300, 300)) / rng.choice([1, 10, 100])]) for _ in range(2)
        )
        low_open, high_open = rng.random() < 0.5, rng.random() < 0.5
        step = rng.choice(
            [None, None, Decimal(5), Decimal("0.25"), Decimal(10), Decimal("2.5"), Decimal("0.1")]
        )
        numbers = NumberRange(fractional=rng.random() < 0.6)
        numbers = numbers if low is None else numbers.above(low, is_open=low_open)
        numbers = numbers if high is None else numbers.below(high, is_open=high_open)
        numbers = numbers if step is None else numbers.times(step)
        node = numbers.node()
        assert node is not None
        automaton = Automaton(200_000)
        near = [bound for bound in (low, high) if bound is not None] or [Decimal(0)]
        for _ in range(40):
            value = Decimal(rng.randint(-40000, 40000)) / rng.choice([1, 10, 100])
            if rng.random() < 0.4:
                value = rng.choice(near) + rng.choice([0, 1, -1, Decimal("0.01"), Decimal("-0.01")])
            expected = (
                (low is None or value > low or (value == low and not low_open))
                and (high is None or value < high or (value == high and not high_open))
                and (numbers.fractional or value == int(value))
                and (step is None or value % step == 0)
            )
            assert automaton.accepts(node, plain_text(value)) == expected, (numbers, value)


def test_ebnf() -> None:
    flat = compile_("ebnf", 'root ::= "a" [0-9]+ (b | "\\x63")?  # comment\nb ::= "bb"\n')
    assert [accepts(flat, text) for text in ("a1", "a12bb", "a1c", "a", "a1b")] == [
        True,
        True,
        True,
        False,
        False,
    ]
    wide = compile_("ebnf", 'root ::= "\\U0001F389" [\\U00000041-\\U00000043\\\\]')
    assert accepts(wide, "🎉B") and accepts(wide, "🎉\\") and not accepts(wide, "🎉D")
    nested = compile_("ebnf", 'root ::= "(" root ")" | [a-z]* "z" | [^()a-z]{2}')
    for text, expected in (
        ("z", True),
        ("((abz))", True),
        ("(11)", True),
        ("ab", False),
        ("(z", False),
        ("1", False),
    ):
        assert accepts(nested, text) == expected, text


TOOL = {
    "type": "object",
    "properties": {"x": {"type": "integer"}},
    "required": ["x"],
    "additionalProperties": False,
}


def test_structures() -> None:
    tag = {
        "type": "structural_tag",
        "structures": [
            {"begin": "<function=get>", "schema": TOOL, "end": "</function>"},
            {"begin": "<function=put>", "schema": {"type": "object"}, "end": "</function>"},
        ],
        "triggers": ["<function="],
    }
    grammar = compile_("structural_tag", tag)
    for text, expected in (
        ("", True),
        ("just <b>text</b>", True),
        ('hi <function=get>{"x":1}</function> bye', True),
        ('<function=put>{}</function><function=get>{"x": 2}</function>', True),
        ('<function=get>{"x":"a"}</function>', False),
        ("a <function=foo>", False),
        ("<function=", False),
        ("<functio", True),
    ):
        assert accepts(grammar, text) == expected, text
    tag["structures"][1]["schema"] = {"not": {"uniqueItems": True}}  # type: ignore[index]
    with pytest.raises(GrammarError) as caught:
        compile_("structural_tag", tag)
    assert caught.value.pointer == "/structures/1/schema/not/uniqueItems"


def test_formats_of_structural_tags() -> None:
    call = {
        "type": "tag",
        "begin": "<t>",
        "content": {"type": "json_schema", "json_schema": TOOL},
        "end": "</t>",
    }
    thinking = {"type": "tag", "begin": "<think>", "content": {"type": "any_text"}, "end": "</think>"}
    calls = {"type": "triggered_tags", "triggers": ["<t>"], "tags": [call], "at_least_one": True}
    grammar = compile_("structural_tag", {"format": {"type": "sequence", "elements": [thinking, calls]}})
    for text, expected in (
        ('<think>ab<c</think>x <t>{"x":1}</t> y', True),
        ('<think>a<t></think><t>{"x":12}</t>', True),
        ("<think>ab</think>x", False),
        ('<t>{"x":1}</t>', False),
    ):
        assert accepts(grammar, text) == expected, text
    once = {"type": "triggered_tags", "triggers": ["<t>"], "tags": [call], "stop_after_first": True}
    grammar = compile_("structural_tag", {"format": once})
    assert accepts(grammar, 'a<t>{"x":1}</t>')
    assert accepts(grammar, "plain")
    assert not accepts(grammar, 'a<t>{"x":1}</t>b')
    either = {"type": "or", "elements": [{"type": "const_string", "value": "yes"}, call]}
    grammar = compile_("structural_tag", {"format": either})
    assert [accepts(grammar, text) for text in ("yes", '<t>{"x": 3}</t>', "no")] == [True, True, False]
    with pytest.raises(GrammarError, match="qwen_xml_parameter") as caught:
        compile_("structural_tag", {"format": {"type": "qwen_xml_parameter"}})
    assert caught.value.pointer == "/format/type"


# ------------------------------------------------------------------ the compiler
def test_equal_specs_compile_once_and_the_oldest_leaves() -> None:
    compiled: list[GrammarSpec] = []

    class Counting:
        def __call__(self, spec: GrammarSpec) -> Grammar:
            compiled.append(spec)
            time.sleep(0.05)
            return backend().compile(spec)

        def prepare(self) -> None: ...

        def close(self) -> None: ...

    compiler = GrammarCompiler([Counting], max_entries=2)
    specs = [GrammarSpec("choices", json.dumps([str(number)])) for number in range(3)]
    futures = [compiler.submit(specs[0]) for _ in range(3)]
    assert not futures[0].cancel()
    assert len({id(future.result()) for future in futures}) == 1
    for spec in specs[1:]:
        compiler.submit(spec).result()
    assert compiled == specs
    wait([compiler.submit(specs[2]), compiler.submit(specs[0])])
    assert compiled == [*specs, specs[0]]
    assert compiler.waiting == 0
    compiler.close()
    with pytest.raises(RuntimeError):
        compiler.submit(specs[0])


HOSTILE = {
    "deep": ("json_schema", '{"properties":{"a":' * 2000 + "{}" + "}}" * 2000),
    "brackets": ("json_schema", "[" * 100_000),
    "product": (
        "json_schema",
        json.dumps({"allOf": [{"anyOf": [{"maxLength": i}, {"minLength": i + 9}]} for i in range(40)]}),
    ),
    "megabyte": (
        "json_schema",
        json.dumps(
            {"properties": {f"p{i}{'x' * 60}": {"type": "string", "maxLength": i} for i in range(9000)}}
        ),
    ),
    "repetition": ("regex", "((((a{0,99}b){0,99}c){0,99}d){0,99}e){0,99}" * 30),
    "exponential": (
        "json_schema",
        json.dumps({"allOf": [{"pattern": f"a.{{{i}}}b"} for i in range(10, 22)], "type": "string"}),
    ),
    "groups": ("regex", "(" * 5000 + ")" * 5000),
    "doubling": (
        "ebnf",
        "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1} r{i + 1}\n" for i in range(40)) + 'r40 ::= "a"',
    ),
}


@pytest.mark.slow
def test_hostile_grammars_cost_only_their_sender() -> None:
    compiler = backend_compiler("llguidance", tokenizer(), [eos_id()])
    compiler.submit(GrammarSpec("choices", '["a"]')).result()
    for name, (kind, source) in HOSTILE.items():
        started = time.monotonic()
        future = compiler.submit(GrammarSpec(kind, source))  # type: ignore[arg-type]
        other = compiler.submit(GrammarSpec("choices", json.dumps([name])))
        assert other.result(timeout=10).matcher().forced() is not None
        error = future.exception(timeout=10)
        assert time.monotonic() - started < 2.5, name
        if name != "repetition":
            assert isinstance(error, GrammarError), name
            assert error.code == "grammar_too_complex", (name, error.message)
    compiler.close()


def test_a_warm_compiler_has_a_sandbox_that_only_takes_what_is_left() -> None:
    compiler = backend_compiler("llguidance", tokenizer(), [eos_id()])
    compiler.warm()
    compiler.warm()
    me = psutil.Process()
    while not (children := [p for p in me.children() if "trunkline.grammar.sandbox" in p.cmdline()]):
        time.sleep(0.01)
    assert compiler.submit(GrammarSpec("choices", '["a"]')).result(30).matcher() is not None
    assert [os.sched_getscheduler(child.pid) for child in children] == [os.SCHED_IDLE]
    compiler.close()
    assert not any(child.is_running() for child in children)


def test_a_sandbox_that_was_killed_is_no_fault_of_the_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    words = tokenizer()
    sandbox = Sandbox("llguidance", words, [eos_id()], Layout(), seconds=30.0, memory=1 << 30)
    sandbox.start()
    killed = sandbox._process
    assert killed is not None
    killed.kill()
    killed.wait()
    monkeypatch.setattr(killed, "poll", lambda: None)  # nobody has noticed when the grammar comes
    assert sandbox.compile(GrammarSpec("choices", '["a"]'))
    assert sandbox._process is not killed

    asked = []

    def receive(connection: Any) -> bytes:
        asked.append(sandbox._process)
        raise EOFError

    monkeypatch.setattr(sandbox, "_receive", receive)
    with pytest.raises(GrammarError) as caught:  # a grammar that ends each one of them is the fault
        sandbox.compile(GrammarSpec("choices", '["b"]'))
    assert caught.value.code == "grammar_too_complex" and len(set(asked)) == 2 == len(asked)
    sandbox.close()


def test_a_sandbox_that_waits_for_a_processor_is_no_fault_of_the_grammar() -> None:
    """Its time is what it computes: at idle priority it may get none for long."""
    sandbox = Sandbox("llguidance", tokenizer(), [eos_id()], Layout(), seconds=0.3, memory=1 << 30)
    sandbox.start()
    assert sandbox._process is not None
    process = psutil.Process(sandbox._process.pid)
    process.suspend()
    threading.Timer(0.8, process.resume).start()
    assert sandbox.compile(GrammarSpec("choices", '["a"]'))
    process.suspend()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox_module, "PATIENCE", 2)  # but not for ever
        with pytest.raises(GrammarError, match="compile"):
            sandbox.compile(GrammarSpec("choices", '["b"]'))
    assert not process.is_running()


@pytest.mark.parametrize("bounds", [{"seconds": 0.2}, {"memory": 8 << 20}, {"haste": 0.2}])
def test_a_grammar_beyond_its_bounds_ends_its_fork_alone(
    bounds: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds = dict(bounds)
    monkeypatch.setattr(sandbox_module, "HASTE", bounds.pop("haste", 60.0))
    given: dict[str, Any] = {"seconds": 20.0, "memory": 1 << 30, **bounds}
    sandbox = Sandbox("llguidance", tokenizer(), [eos_id()], Layout(), **given)
    sandbox.start()
    process = sandbox._process
    for _ in range(2):
        with pytest.raises(GrammarError, match="too much memory") as caught:
            sandbox.compile(GrammarSpec("json_schema", HOSTILE["megabyte"][1]))
        assert caught.value.code == "grammar_too_complex"
        assert sandbox.compile(GrammarSpec("choices", '["a"]'))
    assert sandbox._process is process and process is not None
    sandbox.close()
    assert process.poll() is not None


def test_objects_beyond_the_bits_of_a_state() -> None:
    names = [f"k{number}" for number in range(60)]
    schema = {
        "type": "object",
        "properties": {name: {"type": "integer"} for name in names},
        "required": names[5:7],
    }
    grammar = compile_("json_schema", {**schema, "additionalProperties": False})
    assert accepts(grammar, json.dumps({"k1": 1, "k5": 5, "k6": 6, "k59": 0}))
    assert not accepts(grammar, json.dumps({"k5": 5}))
    assert not accepts(grammar, json.dumps({"k5": 5, "k6": 6, "x": 0}))
    assert accepts(compile_("json_schema", schema), json.dumps({"k5": 5, "k6": 6, "x": 0}))
    many = {"type": "object", "properties": {f"k{number}": {} for number in range(600)}}
    with pytest.raises(GrammarError) as caught:
        compile_("json_schema", many)
    assert caught.value.code == "grammar_too_complex"


def test_an_ambiguous_grammar_ends_its_request() -> None:
    matcher = compile_("ebnf", 'root ::= s\ns ::= s s | [a-z ] | ""').matcher()
    with pytest.raises(GrammarError) as caught:
        for token in tokenizer().encode("many words that have no structure " * 9, add_special_tokens=False):
            allowed(matcher)
            assert matcher.accept(token)
    assert caught.value.code == "grammar_too_complex"
