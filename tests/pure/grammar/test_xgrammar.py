"""The dialect of xgrammar, and xgrammar itself beside the default backend: the same masks, token by token."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from tests.pure.grammar.cases import Case, tables
from tests.pure.grammar.support import HAS_XGRAMMAR, accepts, allowed, compile_, eos_id, tokenizer
from trunkline.grammar.backend import Backend, make_backend
from trunkline.grammar.ebnf_text import EbnfGrammar
from trunkline.grammar.json_text import Layout
from trunkline.grammar.protocol import GrammarError, GrammarKind, GrammarSpec
from trunkline.grammar.translate import write_grammar

needs_xgrammar = pytest.mark.skipif(not HAS_XGRAMMAR, reason="xgrammar is not installed")
# Automata of a pattern and a length together: more states than are written out.
TOO_LARGE = ("email", "hostname")

CALL = {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]}
TAGS = {
    "structures": [
        {"begin": "<f>", "schema": CALL, "end": "</f>"},
        {"begin": "<g>", "schema": {"enum": [1, 22]}},
    ],
    "triggers": ["<"],
}
OBJECT = {
    "type": "object",
    "properties": {name: {"enum": [1, None]} for name in "abc"},
    "required": ["b"],
    "minProperties": 2,
    "dependentRequired": {"a": ["c"]},
    "additionalProperties": False,
}
SPECS: list[tuple[GrammarKind, Any, bool]] = [
    ("json_object", "", False),
    ("json_schema", CALL, True),
    ("json_schema", OBJECT, False),
    ("json_schema", OBJECT, True),
    ("json_schema", {"type": "array", "contains": {"const": 7}, "maxContains": 2, "maxItems": 4}, False),
    ("json_schema", {"type": "array", "items": {"enum": list("abcd")}, "uniqueItems": True}, False),
    ("json_schema", {"type": "string", "pattern": "^[a-f]+$", "not": {"pattern": "cafe"}}, False),
    ("json_schema", {"type": "integer", "multipleOf": 7, "minimum": -20, "maximum": 300}, False),
    ("regex", "(é|ü|日本|[\\u0400-\\uffff]){2,5}x", False),
    ("choices", json.dumps(["yes", "yesterday", "no"]), False),
    ("ebnf", 'root ::= "(" root ")" | [a-z]{2,3} ("," root)?', False),
    ("structural_tag", TAGS, False),
]


def spec_of(kind: GrammarKind, source: Any, ordered: bool) -> GrammarSpec:
    return GrammarSpec(kind, source if isinstance(source, str) else json.dumps(source), ordered)


@pytest.fixture(scope="module")
def other() -> Backend:
    return make_backend("xgrammar", tokenizer(), [eos_id()])


@needs_xgrammar
@pytest.mark.parametrize(("kind", "source", "ordered"), SPECS)
def test_masks_and_forced_text_are_those_of_the_default(
    other: Backend, kind: GrammarKind, source: Any, ordered: bool
) -> None:
    spec = spec_of(kind, source, ordered)
    first, second = compile_(kind, spec.source, ordered=ordered), other.compile(spec)
    rng = random.Random(5)
    for _ in range(4):
        one, two = first.matcher(), second.matcher()
        for _ in range(40):
            options = allowed(one)
            assert allowed(two) == options
            assert two.finished == one.finished
            assert two.forced() == one.forced()
            if one.finished:
                break
            token = rng.choice(sorted(options))
            refused = rng.randrange(tokenizer().num_tokens)
            assert (refused in options) or not two.accept(refused)
            assert one.accept(token) and two.accept(token)
            if rng.random() < 0.2:
                back = rng.choice((two.fork(), two))
                one.rollback(1)
                back.rollback(1)
                assert allowed(back) == allowed(one)
                two = back


@needs_xgrammar
def test_the_keyword_table_holds(other: Backend) -> None:
    wrong, pairs, refused = [], 0, []
    for keywords in tables().values():
        for one in (case for cases in keywords.values() for case in cases):
            try:
                grammar = other.compile(spec_of("json_schema", one.schema, False))
            except GrammarError as error:
                if one.refused is None:
                    refused.append((one.schema, error.code))
                continue
            for value, valid in [*((v, True) for v in one.valid), *((v, False) for v in one.invalid)]:
                pairs += 1
                if accepts(grammar, json.dumps(value, ensure_ascii=False)) != valid:
                    wrong.append((one.schema, value))
    assert wrong == [] and pairs >= 400
    large = [({"type": "string", "format": name}, "grammar_too_complex") for name in TOO_LARGE]
    assert refused == large


@needs_xgrammar
def test_what_it_reads_too_loosely_itself_is_exact_here(other: Backend) -> None:
    """Keywords that its own reader of schemas takes for less than they say."""
    for schema, invalid in (
        ({"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True}, [1, 1]),
        ({"type": "object", "dependentRequired": {"a": ["b"]}, "properties": {"a": {}, "b": {}}}, {"a": 1}),
        ({"not": {"type": "string"}}, "x"),
        ({"if": {"type": "integer"}, "then": {"maximum": 3}}, 4),
        ({"type": "string", "pattern": "^a+$", "maxLength": 2}, "aaa"),
        ({"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 5}]}, 7),
        ({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]}, 6),
    ):
        assert not accepts(other.compile(spec_of("json_schema", schema, False)), json.dumps(invalid))
    with pytest.raises(GrammarError):
        other.compile(spec_of("json_schema", {"$ref": "https://example.com/schema"}, False))


# ---------------------------------------------------------------------- without the package
def cases() -> list[Case]:
    keywords = ("type", "properties, required", "uniqueItems", "contains, minContains, maxContains", "not")
    found = [
        one
        for table in tables().values()
        for name, cases in table.items()
        for one in cases
        if name in keywords
    ]
    return [one for one in found if one.refused is None]


def test_the_dialect_says_what_the_other_one_says() -> None:
    """Read back by the EBNF reader."""
    assert len(cases()) > 20
    for one in cases():
        text = write_grammar(spec_of("json_schema", one.schema, False), Layout(), EbnfGrammar())
        grammar = compile_("ebnf", text.replace("start ::=", "root ::=", 1))
        for value in one.valid:
            assert accepts(grammar, json.dumps(value, ensure_ascii=False)), (one.schema, value)
        for value in one.invalid:
            assert not accepts(grammar, json.dumps(value, ensure_ascii=False)), (one.schema, value)


def test_what_is_too_much_to_write_out_is_refused() -> None:
    names = {f"p{i}": {} for i in range(14)}
    schema = {"type": "object", "properties": names, "additionalProperties": False}
    write_grammar(spec_of("json_schema", schema, True), Layout(), EbnfGrammar())
    with pytest.raises(GrammarError, match="free order") as caught:
        write_grammar(spec_of("json_schema", schema, False), Layout(), EbnfGrammar())
    assert caught.value.code == "unsupported_grammar"


@needs_xgrammar
def test_a_call_that_takes_too_long_ends_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from trunkline.grammar import xgrammar as module

    backend = make_backend("xgrammar", tokenizer(), [eos_id()])
    matcher = backend.compile(GrammarSpec("ebnf", 'root ::= s\ns ::= s s | [a-z ] | ""')).matcher()
    assert allowed(matcher)
    monkeypatch.setattr(module, "CALL_SECONDS", 0.0)
    token = tokenizer().encode("a", add_special_tokens=False)[0]
    for call in (lambda: allowed(matcher), lambda: matcher.accept(token)):
        with pytest.raises(GrammarError) as caught:
            call()
        assert caught.value.code == "grammar_too_complex"
