"""Masks on a tiny vocabulary against all texts of a language; and what holds between a matcher's calls."""

from __future__ import annotations

import json
import random
import re
from itertools import accumulate, product
from typing import Any

import numpy as np
import pytest

from tests.pure.grammar.support import (
    BACKENDS,
    accepts,
    allowed,
    backend,
    compile_,
    eos_id,
    sample,
    tokenizer,
)
from trunkline.grammar.backend import make_backend
from trunkline.grammar.matcher import TokenMatcher
from trunkline.grammar.protocol import GrammarError, GrammarKind, GrammarSpec


class TinyVocabulary:
    """Single letters and a few longer tokens; encodes greedily, every character a word."""

    tokens = (
        b"a",
        b"b",
        b"ab",
        b"ba",
        b"aab",
        b"1",
        b"12",
        b"{",
        b"}",
        b'"',
        b":",
        b",",
        b'{"',
        b'"a"',
        b'":',
        b" ",
    )
    eos = len(tokens)
    special_ids = frozenset({eos, eos + 1})

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) + 2

    def piece(self, token_id: int) -> bytes:
        return self.tokens[token_id] if token_id < self.eos else (b"<eos>", b"")[token_id - self.eos]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self.encode_words(text)[0]

    def encode_words(self, text: str) -> tuple[list[int], list[int]]:
        ids = [self.tokens.index(char.encode()) for char in text]
        return ids, list(range(len(ids)))


TINY = TinyVocabulary()


def languages() -> list[tuple[str, GrammarKind, str, list[str]]]:
    """Constraints with all of their texts up to a length, worked out without this package."""
    letters = ["".join(word) for size in range(9) for word in product("ab1", repeat=size)]
    patterns = ["(ab)*", "a{2,3}b?", "[ab]*1", "(a|ab)(ba|a)", "b+|1{2}|", "[b1]a[ab1]", "(a*b){2}"]
    found: list[tuple[str, GrammarKind, str, list[str]]] = [
        (p, "regex", p, [word for word in letters if re.fullmatch(p, word)]) for p in patterns
    ]
    for words in (["a", "ab", "aab"], ["ba", "b", "12", "1"], ["ab" * 3]):
        found.append((",".join(words), "choices", json.dumps(words), words))
    ebnf = 'root ::= "a" root "b" | "1"?'
    found.append(
        (ebnf, "ebnf", ebnf, ["a" * n + middle + "b" * n for n in range(12) for middle in ("", "1")])
    )
    space = ("", " ")
    objects = (
        ["{}"]
        + ["{" + f'"{k}":{s}{v}' + "}" for k, s, v in product(("a", "b"), space, ("1", "12"))]
        + [
            "{" + f'"{k}":{s}{v},{c}"{o}":{t}{w}' + "}"
            for (k, o), s, v, c, t, w in product(
                (("a", "b"), ("b", "a")), space, ("1", "12"), space, space, ("1", "12")
            )
        ]
    )
    value = {"enum": [1, 12]}
    schema = {"type": "object", "properties": {"a": value, "b": value}, "additionalProperties": False}
    found.append(("object", "json_schema", json.dumps(schema), objects))
    return found


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("kind", "source", "texts"), [pytest.param(*rest, id=name) for name, *rest in languages()]
)
def test_mask_is_what_some_completion_begins_with(
    kind: GrammarKind, source: str, texts: list[str], name: str
) -> None:
    """Walks every prefix that tokens spell."""
    grammar = make_backend(name, TINY, [TINY.eos]).compile(GrammarSpec(kind, source))
    finite = kind in ("choices", "json_schema")
    row = np.zeros(1, np.int32)
    todo: list[tuple[TokenMatcher, str]] = [(grammar.matcher(), "")]
    seen = set()
    while todo:
        matcher, prefix = todo.pop()
        matcher.fill_mask(row)
        for token in range(TINY.num_tokens):
            text = prefix + TINY.piece(token).decode()
            if token == TINY.eos:
                expected = prefix in texts
            elif token > TINY.eos:
                expected = False
            elif not finite and len(text) > 4:
                continue  # the texts that are listed end somewhere
            else:
                expected = any(one.startswith(text) for one in texts)
            assert bool(row.view(np.uint32)[0] >> token & 1) == expected, (prefix, TINY.piece(token))
            if expected and token < TINY.eos and text not in seen:
                seen.add(text)
                following = matcher.fork()
                assert following.accept(token)
                todo.append((following, text))
    assert len(seen) > 3


# ------------------------------------------------------------------ invariants
CONSTRAINTS: tuple[tuple[GrammarKind, Any], ...] = (
    ("regex", r"The answer is: [0-9]{1,3}\. Thank you (very )?much for asking\."),
    ("regex", r"[^x]{5,60}x{3}"),
    ("choices", json.dumps(["hello world", "help me", "h\u00e9\u00e9", "\U0001f600 yes"])),
    ("json_object", ""),
    ("ebnf", 'root ::= "(" root ")" | [a-z]* "z"'),
    (
        "json_schema",
        {
            "type": "object",
            "properties": {
                "name of the customer": {"type": "string", "maxLength": 20},
                "status": {"enum": ["active", "inactive"]},
                "items": {"type": "array", "items": {"type": "integer"}, "maxItems": 4},
                "confirmed at": {"const": "2024-01-01T00:00:00Z"},
            },
            "required": ["name of the customer", "status", "confirmed at"],
            "additionalProperties": False,
        },
    ),
    (
        "structural_tag",
        {
            "structures": [
                {"begin": "<call>", "schema": {"type": "object", "required": ["q"]}, "end": "</call>"}
            ],
            "triggers": ["<call>"],
        },
    ),
)
each_constraint = pytest.mark.parametrize(
    ("kind", "source"), CONSTRAINTS, ids=[kind for kind, _ in CONSTRAINTS]
)


@each_constraint
def test_rollback_and_fork_restore_the_mask(kind: GrammarKind, source: Any) -> None:
    rng = random.Random(3)
    for _ in range(6):
        matcher = compile_(kind, source).matcher()
        masks = []
        for _ in range(25):
            masks.append(allowed(matcher))
            fork = matcher.fork()
            token = rng.choice(sorted(masks[-1]))
            assert matcher.accept(token)
            assert allowed(fork) == masks[-1]
            if token == eos_id():
                assert matcher.finished
                assert not matcher.accept(token)
                assert allowed(matcher) == {token}
                break
        masks.append(allowed(matcher))
        for back in (0, 1, 2, len(masks) - 4):
            if 0 <= back < len(masks):
                matcher.rollback(back)
                masks = masks[: len(masks) - back]
                assert allowed(matcher) == masks[-1]
        with pytest.raises(ValueError, match="were accepted"):
            matcher.rollback(1000)


@each_constraint
def test_what_is_not_allowed_changes_nothing(kind: GrammarKind, source: Any) -> None:
    rng = random.Random(4)
    matcher = compile_(kind, source).matcher()
    for _ in range(20):
        mask = allowed(matcher)
        for token in (*rng.sample(range(tokenizer().num_tokens), 40), 10**6, *tokenizer().special_ids):
            if token not in mask:
                assert not matcher.accept(token)
        assert allowed(matcher) == mask
        assert mask.isdisjoint(tokenizer().special_ids - {eos_id()})
        token = rng.choice(sorted(mask))
        assert matcher.accept(token)
        if token == eos_id():
            break


@each_constraint
def test_forced_tokens_are_the_tokenizers_own(kind: GrammarKind, source: Any) -> None:
    """Whatever text follows, encoding all of it gives the forced tokens in their places; also where
    tokens before are not those that encoding gives."""
    rng = random.Random(5)
    some = 0
    for seed in range(12):
        matcher, unasked = (compile_(kind, source).matcher() for _ in range(2))
        taken: list[int] = []
        for _ in range(40):
            forced = matcher.forced()
            # What was asked before changes nothing, though answers are remembered.
            assert matcher.forced() == unasked.fork().forced() == forced
            for token in forced:
                assert token in allowed(matcher)
                assert matcher.accept(token) and unasked.accept(token)
            if forced:
                some += 1
                before = text_of(taken)
                taken += forced
                for end in endings(matcher, seed):
                    tokens = tokenizer().encode(text_of(taken).decode() + end, add_special_tokens=False)
                    starts = list(accumulate((len(text_of([token])) for token in tokens), initial=0))
                    at = starts.index(len(before))
                    assert tokens[at : at + len(forced)] == forced
            token = rng.choice(sorted(allowed(matcher)))
            if token == eos_id():
                break
            assert matcher.accept(token) and unasked.accept(token)
            taken.append(token)
    assert some or kind in ("json_object", "ebnf", "structural_tag")


def text_of(tokens: list[int]) -> bytes:
    return b"".join(map(tokenizer().piece, tokens))


def endings(matcher: TokenMatcher, seed: int) -> list[str]:
    """Texts with which the output may go on."""
    found = []
    for index in range(4):
        rng, fork, tokens = random.Random(seed * 100 + index), matcher.fork(), []
        for _ in range(3):
            token = rng.choice(sorted(allowed(fork)))
            if token == eos_id():
                break
            fork.accept(token)
            tokens.append(token)
        text = tokenizer().decode(tokens)
        if "\ufffd" not in text:
            found.append(text)
    return found


def test_forced_to_the_end() -> None:
    matcher = compile_("choices", '["hello wide world"]').matcher()
    assert tokenizer().decode(matcher.forced()) == "hello wide world"
    for token in matcher.forced():
        assert matcher.accept(token)
    assert matcher.finished
    assert matcher.forced() == []
    assert allowed(matcher) == {eos_id()}


def test_special_tokens_are_no_text() -> None:
    """A constant that spells a special token is written in pieces, and not forced."""
    grammar = compile_("choices", '["a <|im_end|> b"]')
    matcher = grammar.matcher()
    assert set(matcher.forced()).isdisjoint(tokenizer().special_ids)
    text = sample(grammar, 0)
    assert text == "a <|im_end|> b"


@pytest.mark.parametrize("spaces", ["never", "optional", "always"])
def test_layout(spaces: str) -> None:
    schema = json.dumps(
        {
            "type": "object",
            "properties": {"a": {"const": [1, 2]}},
            "required": ["a"],
            "additionalProperties": False,
        }
    )
    grammar = backend(spaces).compile(GrammarSpec("json_schema", schema))
    assert accepts(grammar, '{"a":[1,2]}') == (spaces != "always")
    assert accepts(grammar, '{"a": [1, 2]}') == (spaces != "never")
    for bad in ('{"a":  [1,2]}', '{ "a":[1,2]}', '{"a":[1,2] }', '{"a":\n[1,2]}', '{"a" :[1,2]}'):
        assert not accepts(grammar, bad)


def test_ordered_properties() -> None:
    schema = {
        "type": "object",
        "properties": {"b": {"type": "null"}, "a": {"type": "null"}, "c": {"type": "null"}},
        "required": ["b"],
    }
    grammar = compile_("json_schema", schema, ordered=True)
    for text, expected in (
        ('{"b":null,"a":null,"c":null}', True),
        ('{"b":null,"c":null,"x":1}', True),
        ('{"b":null}', True),
        ('{"a":null,"b":null}', False),
        ('{"x":1,"b":null}', False),
        ('{"b":null,"c":null,"a":null}', False),
    ):
        assert accepts(grammar, text) == expected, text


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("regex", "(a"),
        ("regex", "[b-a]"),
        ("regex", "a{2,1}"),
        ("regex", "[^\\s\\S]"),
        ("choices", "[]"),
        ("choices", '["a", 1]'),
        ("choices", "no json"),
        ("choices", '["\\ud800"]'),
        ("json_schema", '{"const": "\\udc00"}'),
        ("ebnf", "root = 1"),
        ("ebnf", 'root ::= "a" root'),
        ("ebnf", "root ::= other"),
        ("json_schema", "{"),
        ("json_schema", '{"type": "texts"}'),
        ("json_schema", '{"minLength": -1}'),
        ("json_schema", '{"$ref": "#/nowhere"}'),
        ("json_schema", '{"type": "integer", "minimum": 2, "maximum": 1}'),
        ("json_schema", '{"required": ["a"], "type": "object", "properties": {"a": {"$ref": "#"}}}'),
        ("json_schema", "[]"),
        ("structural_tag", "{}"),
        ("structural_tag", '{"structures": [{"begin": "x", "schema": {}}], "triggers": ["y"]}'),
    ],
)
def test_malformed_constraints(kind: GrammarKind, source: str) -> None:
    with pytest.raises(GrammarError) as caught:
        compile_(kind, source)
    assert caught.value.code == "invalid_grammar"
    assert caught.value.status == 400
