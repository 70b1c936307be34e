"""A program that fails: the original exception with the program's line, and nobody else harmed."""

from __future__ import annotations

import time
from typing import Any

import pytest

import trunkline as sgl
from tests.pure.lang.fake import FakeBackend
from trunkline.lang.executor import ProgramCancelled


class ModelDown(Exception):
    pass


def test_the_original_exception_with_the_line(fake: FakeBackend) -> None:
    down = ModelDown("no model")
    fake.answer = lambda text: down

    @sgl.function
    def program(s: Any) -> None:
        s += "text"
        s += sgl.gen("a")  # this line
        s += "never"

    state = program.run()
    for read in (lambda: state["a"], state.text, state.sync, state.messages, lambda: list(state.text_iter())):
        with pytest.raises(ModelDown) as caught:
            read()
        assert caught.value is down
    assert state.error() is down
    (note,) = down.__notes__
    assert 'in program "program"' in note and note.endswith('s += sgl.gen("a")  # this line')
    assert __file__ in note
    state += "more"  # dropped
    assert state.stream_executor.transcript.text == "text"


def test_values_from_before_the_failure_stay(fake: FakeBackend) -> None:
    fake.answer = lambda text: "ok" if text == "" else ModelDown()

    @sgl.function
    def program(s: Any) -> None:
        s += sgl.gen("good") + "x" + sgl.gen("bad") + sgl.gen("later")

    state = program.run()
    assert state["good"] == "ok"
    for name in ("bad", "later", "unknown"):
        with pytest.raises(ModelDown):
            _ = state[name]


def test_a_stream_that_breaks_off_leaves_no_half_value(fake: FakeBackend) -> None:
    from collections.abc import AsyncGenerator

    async def half(*_: Any) -> AsyncGenerator[Any, None]:
        yield "ha", {}
        raise ModelDown

    fake.generate = half  # type: ignore[method-assign, assignment]

    @sgl.function
    def program(s: Any) -> None:
        s += sgl.gen("a")

    state = program.run(stream=True)
    shown = []
    with pytest.raises(ModelDown):
        for text in state.text_iter("a"):
            shown.append(text)
    assert shown == ["ha"]
    with pytest.raises(ModelDown):
        _ = state["a"]


def test_an_error_of_the_function_itself(fake: FakeBackend) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.gen("a")
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        program.run()
    state = program.run(stream=True)
    with pytest.raises(LookupError):
        list(state.text_iter())
    assert isinstance(state.error(), LookupError)


def test_an_error_before_anything_was_said(fake: FakeBackend) -> None:
    @sgl.function
    def program(s: Any) -> None:
        time.sleep(0.02)
        raise LookupError("mine")

    for read in (lambda s: s.sync(), lambda s: s["a"], lambda s: s.get_meta_info("a"), lambda s: "a" in s):
        with pytest.raises(LookupError, match="mine"):
            read(program.run(stream=True))
    assert isinstance(program.run(stream=True).error(), LookupError)


def test_a_failed_read_ends_the_function(fake: FakeBackend) -> None:
    fake.answer = lambda text: ModelDown()

    @sgl.function
    def program(s: Any) -> None:
        s += sgl.gen("a")
        if s["a"] == "x":
            raise AssertionError("not reached")

    with pytest.raises(ModelDown):
        program.run()


def test_a_failed_branch_hangs_nobody(fake: FakeBackend) -> None:
    fake.answer = lambda text: ModelDown("branch") if text.endswith("1") else "fine"

    @sgl.function
    def program(s: Any) -> Any:
        s += "p"
        forks = s.fork(3)
        forks += lambda i: str(i)
        forks += sgl.gen("x")
        return forks

    forks = program.run().ret_value
    assert (forks[0]["x"], forks[2]["x"]) == ("fine", "fine")
    with pytest.raises(ModelDown):
        _ = forks[1]["x"]


def test_joining_a_failed_branch_fails_the_parent(fake: FakeBackend) -> None:
    fake.answer = lambda text: ModelDown("branch") if text.endswith("1") else "fine"

    @sgl.function
    def program(s: Any) -> Any:
        forks = s.fork(2)
        forks += lambda i: str(i)
        forks += sgl.gen("x")
        forks.join()
        s += "never"
        return forks

    state = program.run()
    with pytest.raises(ModelDown, match="branch"):
        state.text()
    assert state.ret_value[0]["x"] == "fine"


@pytest.mark.parametrize("late", [False, True])
def test_a_failed_parent_fails_its_branches(fake: FakeBackend, late: bool) -> None:
    fake.answer = lambda text: ModelDown()

    @sgl.function
    def program(s: Any) -> None:
        s += sgl.gen("a")
        if late:
            s.error()
        forks = s.fork(2)
        deeper = forks[0].fork(2)
        deeper += sgl.gen("x")
        for branch in (*forks, *deeper):
            with pytest.raises(ModelDown):
                branch.sync()

    program.run()


def test_a_failed_commit_fails_the_branches(fake: FakeBackend) -> None:
    async def commit(prompt: Any) -> None:
        raise ModelDown("commit")

    fake.commit = commit  # type: ignore[method-assign]

    @sgl.function
    def program(s: Any) -> Any:
        s += "p"
        return s.fork(2)

    for branch in program.run().ret_value:
        with pytest.raises(ModelDown, match="commit"):
            branch.text()


def test_roles_that_do_not_fit(fake: FakeBackend) -> None:
    @sgl.function
    def nested(s: Any) -> None:
        with s.user():
            s += sgl.assistant("x")

    @sgl.function
    def crossed(s: Any) -> None:
        s += sgl.user_begin() + "x" + sgl.assistant_end()

    with pytest.raises(ValueError, match="role 'assistant' begins inside role 'user'"):
        nested.run().text()
    with pytest.raises(ValueError, match="role 'assistant' ends, but the open role is 'user'"):
        crossed.run().text()


def test_cancelling_aborts_the_call(fake: FakeBackend) -> None:
    fake.door = lambda text: False

    @sgl.function
    def program(s: Any) -> None:
        s += sgl.gen("a")

    state = program.run()
    while not fake.running:
        time.sleep(0.001)
    state.stream_executor.cancel()
    with pytest.raises(ProgramCancelled):
        _ = state["a"]
    while fake.running:
        time.sleep(0.001)
    assert fake.aborted == 1


def test_a_function_that_fails_ends_its_call(fake: FakeBackend) -> None:
    fake.door = lambda text: False

    @sgl.function
    def program(s: Any) -> None:
        s += sgl.gen("a")
        while not fake.running:
            time.sleep(0.001)
        raise LookupError("mine")

    with pytest.raises(LookupError):
        program.run()
    while fake.running:
        time.sleep(0.001)
    assert fake.aborted == 1


def test_a_program_whose_trace_fails_still_runs(fake: FakeBackend) -> None:
    @sgl.function
    def program(s: Any, word: str) -> None:
        assert word in ("a", "b")
        with s.user():
            s += sgl.assistant("x") if word == "b" else "fine"

    states = list(program.run_batch([("a",), ("b",)]))
    assert states[0].text() == "USER:fine\n"
    with pytest.raises(ValueError, match="roles can't be nested"):
        states[1].text()
