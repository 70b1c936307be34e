"""What the soak calls a fault: the run itself needs a server."""

from __future__ import annotations

import copy

import psutil
import pytest

from tests.soak.cases import cases, essence, extended, one_of
from tests.soak.clients import is_clean
from tests.soak.processes import Watch

CLEAN = {
    "finished": {"chat": 3},
    "errors": 0,
    "wrong_answers": 0,
    "answers_changed_afterwards": 0,
    "running_at_end": 0.0,
    "waiting_at_end": 0.0,
    "tokens_held_at_end": 0.0,
    "tokens_held_after_flush": 0.0,
    "processes": {"api rss_mib": {"grows": False}},
}


def watch(values: list[float], name: str = "core rss_mib") -> Watch:
    return Watch({"core": psutil.Process()}, [10.0 * i for i in range(len(values))], {name: values})


def test_growth_is_that_of_the_second_half() -> None:
    filled = watch([100.0 + 10 * min(i, 50) for i in range(101)]).figures()["core rss_mib"]
    assert filled == {"start": 200.0, "now": 600.0, "max": 600.0, "second_half": 0.0, "grows": False}
    leaking = watch([100.0 + 0.5 * i for i in range(101)]).figures()["core rss_mib"]
    assert leaking["second_half"] == 25.0 and leaking["grows"]
    assert watch([20.0 + 0.2 * i for i in range(101)], "api fds").figures()["api fds"]["grows"]


@pytest.mark.parametrize("name", [name for name in CLEAN if name not in ("finished", "processes")])
def test_each_fault_counts(name: str) -> None:
    assert is_clean(CLEAN)
    assert not is_clean({**CLEAN, name: 1})
    grown = copy.deepcopy(CLEAN)
    grown["processes"] = {"api rss_mib": {"grows": True}}
    assert not is_clean(grown) and not is_clean({**CLEAN, "finished": {}})


def test_a_new_grammar_is_another_text_each_time_and_the_rest_stays() -> None:
    (case, *_) = [case for case in cases(0) if case.kind == "grammar new"]
    regexes = {one_of(case, number).body["sampling_params"]["regex"] for number in range(200)}
    assert len(regexes) == 200
    assert {one_of(other, 7) == other for other in cases(0) if other.kind != "grammar new"} == {True}


def test_what_may_differ_is_left_out_of_an_answer() -> None:
    answer = {"id": "x", "usage": {}, "choices": [{"message": {"tool_calls": [{"id": "y", "name": "f"}]}}]}
    assert essence(answer) == {"choices": [{"message": {"tool_calls": [{"name": "f"}]}}]}
    assert extended("a", {"text": "ab", "meta_info": {}}) == "ab"
    assert extended("a", {"type": "content_block_delta", "delta": {"text": "b"}}) == "ab"
    assert extended("a", {"type": "content_block_delta", "delta": {"partial_json": "b"}}) == "ab"
    assert extended("a", {"type": "response.output_text.delta", "delta": "b"}) == "ab"
    assert extended("a", {"type": "response.created", "response": {"error": None}}) == "a"
    assert extended("a", {"message": {"content": "b"}, "done": False}) == "ab"
    assert extended("a", {"response": "b", "done": True}) == "ab"
    with pytest.raises(RuntimeError, match="broken"):
        extended("a", {"error": {"message": "broken"}})
