"""Parallel branches, batches, streams and traces."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import threading
import time
import tracemalloc
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import trunkline as sgl
from tests.pure.lang.fake import FakeBackend
from trunkline.lang.chat_template import get_chat_template
from trunkline.lang.executor import ProgramCancelled, StreamExecutor
from trunkline.lang.ir import Fill, Gen
from trunkline.lang.tracer import Argument


@sgl.function
def echo(s: Any, first: str, second: str = "") -> None:
    s += f"{first}:{second}" + sgl.gen("a")


# ---------------------------------------------------------------------- branches
def test_branches_run_at_once_and_without_threads(fake: FakeBackend) -> None:
    fake.door = lambda text: fake.peak >= 50  # opens only when all are there

    @sgl.function
    def program(s: Any) -> Any:
        forks = s.fork(50)
        forks += sgl.gen("x")
        forks.join()
        return threading.active_count()

    threads = threading.active_count()
    state = program.run()
    assert len(state["x"]) == 50 and fake.peak == 50
    assert state.ret_value <= threads + 1  # the loop's


def test_appending_does_not_wait(fake: FakeBackend) -> None:
    fake.door = lambda text: False

    @sgl.function
    def program(s: Any) -> Any:
        s += sgl.gen("a")
        forks = s.fork(2)
        forks += sgl.gen("b")
        forks.join()
        s += sgl.gen("c")
        return len(forks)

    state = program.run()  # with the door closed
    assert state.ret_value == 2
    fake.door = lambda text: True
    assert state["c"] == "answer" and state["b"] == ["answer", "answer"]


def test_an_early_variable_does_not_wait_for_later_ones(fake: FakeBackend) -> None:
    fake.door = lambda text: not text

    @sgl.function
    def program(s: Any) -> Any:
        s += sgl.gen("first") + sgl.gen("second")
        return s["first"]

    assert program.run().ret_value == "answer"
    fake.door = lambda text: True


# ---------------------------------------------------------------------- batches
def test_results_are_in_the_order_of_the_rows(fake: FakeBackend) -> None:
    fake.answer = lambda text: text
    rows = [{"first": str(i * 7 % 50)} for i in range(50)]
    assert [state["a"] for state in echo.run_batch(rows)] == [f"{row['first']}:" for row in rows]
    tuples = [(row["first"], "t") for row in rows]
    assert [state["a"] for state in echo.run_batch(tuples, num_threads=1)] == [
        f"{row[0]}:t" for row in tuples
    ]
    assert echo.run_batch([]) == []


def test_rows_that_begin_alike_run_one_after_the_other(fake: FakeBackend) -> None:
    @sgl.function
    def program(s: Any, question: str, passage: str) -> None:
        s += f"{passage}\n{question}" + sgl.gen("a")

    rows = [{"question": f"q{i}", "passage": f"p{i % 3}"} for i in range(9)]
    program.run_batch(rows, num_threads=1)
    passages = [text.split("\n")[0] for text, _ in fake.calls]
    assert passages == ["p0"] * 3 + ["p1"] * 3 + ["p2"] * 3  # the passage comes first in the text


def test_the_common_prefix_is_cached_first(fake: FakeBackend) -> None:
    start = "An instruction that all rows share, long enough to be worth it. " * 2

    @sgl.function
    def program(s: Any, word: str) -> None:
        s += sgl.user(start + word)
        s += sgl.assistant(sgl.gen("a"))

    program.run_batch([("a",), ("b",)])
    assert fake.commits == ["USER:" + start]
    program.run_batch([("a",)])  # nobody to share with
    sgl.global_config.enable_precache_with_tracing = False
    try:
        program.run_batch([("a",), ("b",)])
    finally:
        sgl.global_config.enable_precache_with_tracing = True
    assert len(fake.commits) == 1
    program.cache()
    assert fake.commits == ["USER:" + start] * 2


def test_a_thousand_rows_with_few_at_once(fake: FakeBackend) -> None:
    threads = threading.active_count()
    most_threads = 0

    def answer(text: str) -> str:
        nonlocal most_threads
        most_threads = max(most_threads, threading.active_count())
        return text

    fake.answer = answer
    states = list(echo.run_batch([(str(i),) for i in range(1000)], num_threads=40))
    assert [state["a"] for state in states] == [f"{i}:" for i in range(1000)]
    assert 1 < fake.peak <= 40
    assert all(state.stream_executor._task is None for state in states)
    assert most_threads <= threads + 42  # the loop's, and at most one a place


def test_rows_that_read_on_their_way(fake: FakeBackend) -> None:
    fake.delay = 0.001

    @sgl.function
    def steps(s: Any, n: int) -> str:
        text = ""
        for _ in range(3):
            s += f"{n}" + sgl.gen("x")
            text += s["x"]
        return text

    states = list(steps.run_batch([(i,) for i in range(200)]))
    assert [state.ret_value for state in states] == ["answer" * 3] * 200
    assert 1 < fake.peak <= 96


def test_a_failed_row_ends_no_other(fake: FakeBackend, caplog: pytest.LogCaptureFixture) -> None:
    fake.answer = lambda text: ValueError("row") if text.startswith("3") else "fine"

    @sgl.function
    def program(s: Any, i: int) -> None:
        s += f"{i}" + sgl.gen("a")
        if i == 5:
            raise LookupError("body")

    with caplog.at_level(logging.WARNING):
        states = list(program.run_batch([(i,) for i in range(8)]))
    assert [state["a"] for i, state in enumerate(states) if i not in (3, 5)] == ["fine"] * 6
    with pytest.raises(ValueError, match="row"):
        _ = states[3]["a"]
    assert isinstance(states[5].error(), LookupError)
    assert "2 of 8 rows failed; the first is row 3: ValueError('row')" in caplog.text


def test_generator_style_keeps_a_chunk(fake: FakeBackend) -> None:
    fake.answer = lambda text: text
    states = echo.run_batch([(str(i),) for i in range(450)], generator_style=True)
    assert not isinstance(states, list)
    seen = []
    for i, state in enumerate(states):
        seen.append(state["a"])
        assert len(fake.calls) <= (i // 200 + 1) * 200
    assert seen == [f"{i}:" for i in range(450)]
    assert list(echo.run_batch([], generator_style=True)) == []


def test_generator_style_keeps_memory_flat(fake: FakeBackend) -> None:
    """A state that nobody holds is gone at once, without the garbage collector; the rest is bounded by a
    chunk, however many rows there are."""
    shared = "x" * 2000

    @sgl.function
    def program(s: Any, i: int) -> None:
        s += f"{i}{shared}" + sgl.gen("a") + sgl.gen("b")

    def peak(num_rows: int) -> int:
        rows = [{"i": i} for i in range(num_rows)]
        fake.calls = deque(maxlen=1)
        alive: weakref.WeakSet[Any] = weakref.WeakSet()
        most = 0
        tracemalloc.start()
        for state in program.run_batch(rows, num_threads=8, generator_style=True):
            alive.add(state.stream_executor)
            most = max(most, len(alive))
        del state
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most <= 200 and not alive
        return found

    peak(20)  # what is made once
    gc.disable()
    try:
        few, many = peak(400), peak(2000)
    finally:
        gc.enable()
    assert many < 1.5 * few


def test_progress_bar(fake: FakeBackend, capsys: pytest.CaptureFixture[str]) -> None:
    echo.run_batch([("a",), ("b",), ("c",)], progress_bar=True)
    assert "3/3" in capsys.readouterr().err


def test_rows_that_do_not_fit(fake: FakeBackend) -> None:
    for rows in ([("a", "b", "c")], [()], ["text"]):
        with pytest.raises(ValueError, match="doesn't fit the program's arguments \\(first, second\\)"):
            echo.run_batch(rows)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        echo.run_batch([("a",)], temprature=0)


@pytest.fixture
def interrupt(fake: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Sends the signal of Ctrl-C when so many calls run that never end, and somebody waits for them."""
    fake.door = lambda text: False
    threads = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    waiting, wait = threading.Event(), StreamExecutor.wait

    def noted(self: StreamExecutor, work: Any) -> Any:
        waiting.set()
        return wait(self, work)

    monkeypatch.setattr(StreamExecutor, "wait", noted)

    def press(calls: int) -> None:
        waiting.wait(30)
        while fake.running < calls:
            time.sleep(0.001)
        time.sleep(0.05)  # from the note to the wait itself
        os.kill(os.getpid(), signal.SIGINT)

    def start(calls: int) -> None:
        threads.append(threading.Thread(target=press, args=(calls,)))
        threads[0].start()

    yield start
    for thread in threads:
        thread.join()
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_batch_gives_up_the_rest(fake: FakeBackend, interrupt: Callable[[int], None]) -> None:
    """With its branches, and with programs that its rows have called."""

    @sgl.function
    def inner(s: Any) -> None:
        forks = s.fork(2)
        forks += sgl.gen("x")
        forks.join()

    @sgl.function
    def outer(s: Any, i: int) -> None:
        if i == 1:
            inner()["x"]
        s += sgl.gen("a")

    interrupt(4)
    with pytest.raises(KeyboardInterrupt):
        outer.run_batch([(i,) for i in range(10)], num_threads=3)
    while fake.running:
        time.sleep(0.001)
    assert (len(fake.calls), fake.aborted) == (4, 4)


@pytest.mark.parametrize("reader", ["function", "caller", "stream"])
def test_an_interrupted_read_gives_up_the_program(
    fake: FakeBackend, interrupt: Callable[[int], None], reader: str
) -> None:
    @sgl.function
    def program(s: Any) -> None:
        forks = s.fork(2)
        forks += sgl.gen("x")
        forks.join()
        if reader == "function":
            s.sync()

    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        state = program.run(stream=reader == "stream")
        "".join(state.text_iter())
    while fake.running:
        time.sleep(0.001)
    assert (len(fake.calls), fake.aborted) == (2, 2)
    if reader != "function":
        assert isinstance(state.error(), ProgramCancelled)


# ---------------------------------------------------------------------- streams
def test_text_iter(fake: FakeBackend) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "say " + sgl.gen("a")
        s += "; " + sgl.gen("b")

    state = program.run(stream=True)
    pieces = list(state.text_iter())
    assert "".join(pieces) == "say answer; answer" == state.text()
    pieces = list(program.run(stream=True).text_iter("b"))
    assert "".join(pieces) == "answer" and all(pieces)
    whole = program.run()
    assert list(whole.text_iter()) == [whole.text()]
    assert list(whole.text_iter("a")) == ["answer"]


def test_text_comes_before_the_program_is_through(fake: FakeBackend) -> None:
    fake.door = lambda text: "second" not in text

    @sgl.function
    def program(s: Any) -> None:
        s += sgl.gen("a") + "second" + sgl.gen("b")

    state = program.run(stream=True)
    texts = state.text_iter()
    seen = ""
    while "second" not in seen:
        seen += next(texts)
    assert list(state.text_iter("a")) and not state.stream_executor.finished
    fake.door = lambda text: True
    assert seen + "".join(texts) == "answersecondanswer"


def test_a_branch_read_beside_a_stream(fake: FakeBackend) -> None:
    @sgl.function
    def program(s: Any) -> Any:
        (branch,) = s.fork()
        branch += "!" + sgl.gen("b")
        assert branch.text() == "".join(branch.text_iter()) == "!answer"
        time.sleep(0.02)
        branch += "."
        return branch

    state = program.run(stream=True)
    assert state.error() is None
    assert state.ret_value["b"] == "answer" and "".join(state.ret_value.text_iter()) == "!answer."


async def test_text_async_iter(fake: FakeBackend) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "p" + sgl.gen("a")

    state = program.run(stream=True)
    assert "".join([text async for text in state.text_async_iter()]) == "panswer"
    pairs = [pair async for pair in program.run(stream=True).text_async_iter("a", return_meta_data=True)]
    assert "".join(text for text, _ in pairs) == "answer"
    assert all(meta == {"prompt": 1} for _, meta in pairs)
    several = [program.run(stream=True).text_async_iter("a") for _ in range(5)]

    async def join(texts: Any) -> str:
        return "".join([text async for text in texts])

    assert await asyncio.gather(*map(join, several)) == ["answer"] * 5
    assert [text async for text in program.run().text_async_iter()] == ["panswer"]


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda state: state.sync(), None),
        (lambda state: state.error(), None),
        (lambda state: state.text(), "panswer"),
        (lambda state: state["a"], "answer"),
        (lambda state: state.get_meta_info("a"), {"prompt": 1}),
        (lambda state: "a" in state, True),
    ],
)
def test_reading_beside_a_stream_waits_for_what_the_program_will_say(
    fake: FakeBackend, read: Callable[[Any], Any], expected: Any
) -> None:
    """Its thread may not have begun when the state is there."""
    go = threading.Event()

    @sgl.function
    def program(s: Any) -> None:
        go.wait(10)
        s += "p"
        s.sync()  # what the program itself waits for is what it has said
        assert s.text() == "p"
        s += sgl.gen("a")

    threading.Timer(0.05, go.set).start()
    state = program.run(stream=True)
    assert read(state) == expected
    assert state.stream_executor.variables == {"a": "answer"} and state.error() is None


def test_a_variable_that_never_comes(fake: FakeBackend) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.gen("a")

    with pytest.raises(KeyError, match="sets no variable 'b'"):
        list(program.run(stream=True).text_iter("b"))


# ---------------------------------------------------------------------- traces
def test_trace(fake: FakeBackend) -> None:
    @sgl.function
    def program(s: Any, topic: str, n: int = 3) -> None:
        s += "About " + topic + f" ({n:>3})" + sgl.gen("a")
        s += sgl.user(s["a"])
        forks = s.fork(2)
        forks += f"[{topic}]"
        forks.join()
        if n > 2:
            s += "never traced"

    state = program.trace()
    nodes = state.stream_executor.nodes
    assert [type(node).__name__ for node in nodes[:6]] == [
        "Fill",
        "Argument",
        "Fill",
        "Argument",
        "Fill",
        "Gen",
    ]
    assert isinstance(nodes[0], Fill) and isinstance(nodes[1], Argument) and isinstance(nodes[5], Gen)
    assert (nodes[0].text, nodes[1].name, nodes[5].name) == ("About ", "topic", "a")
    assert state.stream_executor.arguments() == ["topic", "n"]
    assert not any(
        isinstance(node, Fill) and "never" in node.text for node in state.stream_executor.flatten()
    )
    assert fake.calls == []
    bound = program.trace(topic="cats", n=1).stream_executor
    assert bound.prefix(get_chat_template("default")) == "About cats (  1)"


def test_a_nested_program_is_traced_too(fake: FakeBackend) -> None:
    @sgl.function
    def inner(s: Any) -> None:
        s += sgl.gen("x")

    @sgl.function
    def outer(s: Any) -> None:
        s += "see " + inner()["x"]
        s += "end"

    outer.trace()
    assert fake.calls == []


def test_a_trace_stops_where_a_value_is_needed(fake: FakeBackend) -> None:
    for use in (
        len,
        list,
        int,
        bool,
        lambda x: x == "a",
        lambda x: x.upper(),
        lambda x: x[0],
        lambda x: x < 3,
    ):

        @sgl.function
        def program(s: Any, arg: Any, use: Any = use) -> None:
            s += "before"
            use(arg)
            s += "after"

        trace = program.trace(use=use).stream_executor
        assert trace.prefix(get_chat_template("default")) == "before"
