"""Regular expressions that end an output: the same end wherever the text is cut, in linear time."""

from __future__ import annotations

import itertools
import re
from random import Random

import httpx
import pytest

from trunkline.text.stop import StopMatcher
from trunkline.text.stop_regex import RegexMatcher, compile_stop
from trunkline.types import RequestError

Words = tuple[str, ...]


def run(pieces: list[str], stops: Words, patterns: Words, keep: bool = False) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, patterns, keep_match=keep)
    shown = ""
    for piece in pieces:
        shown += matcher.feed(piece)
        if matcher.matched is not None:
            return shown, matcher.matched
    return shown + matcher.flush(), None


def expected(text: str, stops: Words, patterns: Words, keep: bool) -> tuple[str, str | None]:
    """By Python's own engine: the first end, then the longest match."""
    for end in range(1, len(text) + 1):
        found = [(end - len(stop), stop) for stop in stops if text[:end].endswith(stop)]
        found += [
            (start, pattern)
            for pattern in patterns
            for start in range(end)
            if re.fullmatch(pattern, text[start:end], re.DOTALL)
        ]
        if found:
            start, what = min(found)
            return text[: end if keep else start], what
    return text, None


PATTERNS = [
    r"ab+c", r"a*b", r"(ab|ba){2}", r"[ab]{2,3}c", r"a(b|c)*d?c", r"a.{0,2}c", r"(a|ab)(c|bcd)?d",
    r"[^a]b", r"(a?b?c){2,}", r"\w{3}", r"a{0,2}c", r"(a*)*b",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_agrees_with_pythons_engine(pattern: str) -> None:
    random = Random(pattern)
    for _ in range(150):
        text = "".join(random.choice("abcd") for _ in range(random.randrange(10)))
        pieces = [text[at : at + 2] for at in range(0, len(text), 2)]
        for keep in (False, True):
            assert run(pieces, (), (pattern,), keep) == expected(text, (), (pattern,), keep), text


def test_every_cut_gives_the_same() -> None:
    stops, patterns = ("cab",), (r"ab+c", r"b[cd]a")
    for letters in itertools.product("abcd", repeat=6):
        text = "".join(letters)
        want = expected(text, stops, patterns, keep=False)
        for cut in range(7):
            assert run([text[:cut], text[cut:]], stops, patterns) == want
        assert run(list(text), stops, patterns) == want


def test_only_what_may_become_a_match_is_held_back() -> None:
    matcher = StopMatcher((), (r"\n\n[0-9]+\.",))
    assert matcher.feed("one\n") == "one"
    assert matcher.feed("two") == "\ntwo"
    assert matcher.feed("\n\n12") == "" and matcher.feed("x") == "\n\n12x"
    assert matcher.feed("\n\n3.") == "" and matcher.matched == r"\n\n[0-9]+\."


@pytest.mark.parametrize(
    "pattern", [r"(a*)*b", r"(a|a)*b", r"(a|aa)+b", r".*a.{200}z", r"(.*){3}=", r"(x+x+)+y"]
)
def test_hostile_patterns_take_linear_time(pattern: str) -> None:
    """Steps, not seconds: what is live never outgrows the pattern."""
    matcher = RegexMatcher(compile_stop(pattern))
    for piece in ["ax" * 500] * 4:
        assert matcher.feed(piece) is None
        assert len(matcher._live) <= len(compile_stop(pattern).chars) <= 210


@pytest.mark.parametrize(
    ("pattern", "word"),
    [
        ("a*", "empty text"), ("", "empty text"), ("^a", "has ^ or $"), ("a$", "has ^ or $"),
        (r"(a)\1", "backreference"),
        ("(?=a)b", ""), (r"\bx", ""), ("a{600}", "too large"), ("(a{30}){30}", "too large"), ("(", ""),
        ("(a?){400}b", "too large"), ("[^\\s\\S]", "no text"),
    ],
)  # fmt: skip
def test_what_can_not_be_had_is_refused(pattern: str, word: str) -> None:
    with pytest.raises(RequestError) as caught:
        compile_stop(pattern)
    assert word in caught.value.message
    assert 400 <= caught.value.status < 500


async def test_over_http(http: httpx.AsyncClient) -> None:
    """The fake core says "Hello, wörld! ..."."""
    params = {"sampling_params": {"stop_regex": "w.r", "stop": ["never"]}}
    answer = (await http.post("/generate", json={"text": "a", **params})).json()
    assert answer["text"] == "Hello, "
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": "w.r"}
    chat = {
        "messages": [{"role": "user", "content": "hi"}],
        "stop_regex": ["w.r", "x+"],
        "no_stop_trim": True,
    }
    choice = (await http.post("/v1/chat/completions", json=chat)).json()["choices"][0]
    assert choice["message"]["content"] == "Hello, wör" and choice["matched_stop"] == "w.r"
    for bad in ("a*", "(", "x" * 300):
        response = await http.post("/v1/completions", json={"prompt": "a", "stop_regex": bad})
        assert response.status_code == 400 and response.json()["error"]["param"] == "stop_regex"
