"""Every word of the language, run on a backend without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import trunkline as sgl
from tests.pure.lang.fake import FakeBackend
from trunkline.lang.ir import Gen, Select
from trunkline.types import RequestError


def test_text_and_gen(fake: FakeBackend) -> None:
    @sgl.function
    def qa(s: Any, question: str, tail: str = "!") -> str:
        """Doc."""
        s += "Q: " + question + "\nA:"
        s += sgl.gen("a", max_tokens=7, stop="\n") + tail
        s += "more" + sgl.gen()
        return "returned"

    state = qa.run("why?")
    assert state.text() == "Q: why?\nA:answer!moreanswer"
    assert state["a"] == "answer" and "a" in state and "b" not in state
    assert state.ret_value == "returned" and state.error() is None
    assert (qa.__name__, qa.__doc__) == ("qa", "Doc.")
    assert qa("why?", tail="?").text().startswith("Q: why?\nA:answer?")
    first = fake.calls[0]
    assert first[0] == "Q: why?\nA:"
    assert (first[1].max_new_tokens, first[1].stops, first[1].temperature) == (7, ("\n",), 1.0)
    assert fake.calls[1][1].max_new_tokens == 128
    assert state.get_meta_info("a") == {"prompt": 10}


def test_what_a_gen_says_wins_over_the_run(fake: FakeBackend) -> None:
    @sgl.function
    def both(s: Any) -> None:
        s += sgl.gen("a") + sgl.gen("b", temperature=0.5, top_k=3, ignore_eos=False, max_tokens=0)

    both.run(temperature=0.0, max_new_tokens=5, stop=["x"], ignore_eos=True).sync()
    (_, one), (_, other) = fake.calls
    assert (one.temperature, one.max_new_tokens, one.stops, one.ignore_eos) == (0.0, 5, ("x",), True)
    assert (other.temperature, other.max_new_tokens, other.top_k, other.ignore_eos) == (0.5, 0, 3, False)


def test_every_parameter_of_gen_arrives(fake: FakeBackend) -> None:
    given: dict[str, Any] = {
        "max_tokens": 1, "min_tokens": 1, "n": 1, "stop": ["."], "stop_token_ids": [3], "stop_regex": "x+",
        "temperature": 0.1, "top_p": 0.2, "top_k": 4, "min_p": 0.3, "frequency_penalty": 0.4,
        "presence_penalty": 0.5, "ignore_eos": True, "return_logprob": True, "logprob_start_len": 2,
        "top_logprobs_num": 3, "return_text_in_logprobs": True, "dtype": int, "regex": "[a-z]+",
        "json_schema": "{}",
    }  # fmt: skip

    @sgl.function
    def program(s: Any) -> None:
        s += sgl.gen("x", **given)

    program.run().sync()
    ((_, sampling),) = fake.calls
    renamed = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "stop": "stops"}
    seen = {name: getattr(sampling, renamed.get(name, name)) for name in given}
    assert seen == {**given, "stop": (".",)}


def test_typed_gens() -> None:
    number, text = sgl.gen_int("i", max_tokens=3, temperature=0), sgl.gen_string("t", 4)
    assert isinstance(number, Gen) and isinstance(text, Gen)
    assert (number.sampling.dtype, number.sampling.max_new_tokens, number.sampling.temperature) == (int, 3, 0)
    assert (text.sampling.dtype, text.sampling.max_new_tokens) == (str, 4)
    with pytest.raises(TypeError, match=r"regex doesn't go with gen_int\(\)"):
        sgl.gen_int("i", regex="[0-9]")
    import re

    with pytest.raises(re.error):
        sgl.gen("x", regex="(")


def test_n_completions(fake: FakeBackend) -> None:
    @sgl.function
    def several(s: Any) -> None:
        s += "p" + sgl.gen("a", n=3) + "."

    state = several.run()
    assert state["a"] == ["answer0", "answer1", "answer2"]
    assert state.text() == "panswer0."


def test_select(fake: FakeBackend) -> None:
    @sgl.function
    def choose(s: Any) -> None:
        s += "is " + sgl.select("x", ["red", "blue"]) + " or "
        s += sgl.gen("y", choices=["a", "b"], choices_method=sgl.greedy_token_selection)

    state = choose.run()
    assert (state["x"], state["y"], state.text()) == ("blue", "b", "is blue or b")
    assert state.get_meta_info("x") == {"scores": [0.0, 0.0]}
    (at, first), (_, second) = fake.selects
    assert at == "is " and first.method is sgl.token_length_normalized
    assert second.method is sgl.greedy_token_selection and isinstance(sgl.select("x", "ab"), Select)
    with pytest.raises(ValueError, match="needs choices"):
        sgl.select("x")
    with pytest.raises(ValueError, match="temperature is 1"):
        sgl.select("x", ["a"], temperature=1.0)


def test_roles_and_messages(fake: FakeBackend) -> None:
    fake.template = "qwen"

    @sgl.function
    def chat(s: Any) -> None:
        s += sgl.user("hi")
        s += sgl.assistant_begin() + sgl.gen("a") + sgl.assistant_end()
        with s.user():
            s += "more"
        s.assistant(sgl.gen("b"))
        s += sgl.system_begin() + "be brief" + sgl.system_end() + sgl.user_begin() + "!" + sgl.user_end()

    state = chat.run()
    assert state.messages() == [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "answer"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "answer"},
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "!"},
    ]
    assert state.text().startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nanswer<|im_end|>\n"
    )
    assert fake.calls[0][1].stops == ("<|im_end|>",)  # the template's own


def test_system_text_replaces_the_default(fake: FakeBackend) -> None:
    fake.template = "qwen"

    @sgl.function
    def chat(s: Any) -> None:
        s += sgl.system("short") + sgl.user("hi")

    assert [one["content"] for one in chat.run().messages()] == ["short", "hi"]


def test_scopes_variables_and_copy(fake: FakeBackend) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s["given"] = 3
        with s.var_scope("all"):
            s += "x" + sgl.gen("a") + "y"
        with s.copy() as twin:
            twin += " twin" + sgl.gen("b")
        s["seen"] = twin["b"]
        s.set_var("text", twin.text())
        s += f"|{s['given']}"

    state = program.run()
    assert state["all"] == "xanswery" and state["given"] == 3 and state["seen"] == "answer"
    assert state["text"] == "xanswery twinanswer" and state.text() == "xanswery|3"
    assert "b" not in state


def test_a_variable_read_in_a_loop_is_the_new_one(fake: FakeBackend) -> None:
    fake.answer = lambda text: str(len(text))

    @sgl.function
    def loop(s: Any) -> list[str]:
        values = []
        for _ in range(3):
            s += "ab" + sgl.gen("x")
            values.append(s["x"])
        return values

    assert loop.run().ret_value == ["2", "5", "8"]


def test_fork_and_gather(fake: FakeBackend) -> None:
    fake.answer = lambda text: text[-1]

    @sgl.function
    def tips(s: Any) -> None:
        s["own"] = "mine"
        s += "prefix "
        forks = s.fork(3)
        forks += lambda i: f"{i}"
        forks += sgl.gen("tip")
        forks += ["x", "y", "z"]
        forks.join()
        s += "tips " + ",".join(s["tip"])

    state = tips.run()
    assert state["tip"] == ["0", "1", "2"] and state["own"] == "mine"
    assert state.text() == "prefix tips 0,1,2"
    assert fake.commits == ["prefix "]


def test_fork_and_append(fake: FakeBackend) -> None:
    @sgl.function
    def parts(s: Any) -> None:
        s += "<"
        forks = s.fork(2)
        for i, branch in enumerate(forks):
            branch += f"{i}:" + sgl.gen("v")
        forks.join("concate_and_append")
        s += ">" + sgl.gen("last")

    state = parts.run()
    assert state.text() == "<0:answer1:answer>answer"
    assert "v" not in state and fake.calls[-1][0] == "<0:answer1:answer>"
    with pytest.raises(ValueError, match="gather_variable or concate_and_append"):
        state.fork(1).join("other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="position_ids_offset"):
        state.fork(2, position_ids_offset=[0, 1])
    with pytest.raises(ValueError, match="1 items for 2 states"):
        forks = state.fork(2)
        forks += ["only one"]


def test_a_branch_is_appended_to_by_its_number(fake: FakeBackend) -> None:
    @sgl.function
    def program(s: Any) -> None:
        forks = s.fork(2)
        forks[0] += "a"
        forks[1] += "b" + sgl.gen("x")
        forks.join("concate_and_append")
        with pytest.raises(ValueError, match="can't be replaced"):
            forks[0] = forks[1]

    assert program.run().text() == "abanswer"


def test_switches() -> None:
    sgl.global_config.enable_parallel_encoding = False
    assert sgl.global_config.enable_parallel_encoding is False
    with pytest.raises(ValueError, match="joined branches are read as one text"):
        sgl.global_config.enable_parallel_encoding = True
    with pytest.raises(AttributeError, match="verbose"):
        sgl.global_config.verbose = 2  # type: ignore[attr-defined]


def test_a_prefix_is_committed_once(fake: FakeBackend) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "prefix"
        one, two = s.fork(2), s.fork(2)
        alone = s.fork()
        for branch in (*one, *two, *alone):
            branch += sgl.gen("x")
        deeper = one[0].fork(2)  # right after a generation: all of it is cached
        deeper += "text" + sgl.gen("y")
        s += ", and more"
        s.fork(2)

    program.run().sync()
    assert fake.commits == ["prefix", "prefix, and more"]


def test_nested_programs(fake: FakeBackend) -> None:
    other = FakeBackend(lambda text: "inner")

    @sgl.function
    def inner(s: Any, word: str) -> None:
        s += word + sgl.gen("x")

    @sgl.function
    def outer(s: Any) -> None:
        s += "got " + inner("a")["x"] + inner.run("b")["x"]

    assert outer.run(backend=other).text() == "got inneranswer"  # a call inherits, run takes the default
    assert [text for text, _ in other.calls] == ["a"]


def test_bind(fake: FakeBackend) -> None:
    @sgl.function
    def add(s: Any, a: str, b: str, c: str = "c") -> None:
        s += a + b + c

    bound = add.bind(a="A")
    assert bound.run(b="B").text() == "ABc"
    assert [state.text() for state in bound.run_batch([("x",), ("y", "z")])] == ["Axc", "Ayz"]
    assert bound.bind(b="2").run().text() == "A2c"


def test_separate_reasoning(fake: FakeBackend) -> None:
    fake.answer = lambda text: "<think>\nhm, 7\n</think>\n\n7"

    @sgl.function
    def think(s: Any) -> None:
        s += sgl.user("3+4?")
        s += sgl.assistant(sgl.separate_reasoning(sgl.gen("a"), model_type="qwen3"))
        s += sgl.user("thanks")

    state = think.run()
    assert (state["a"], state["a_reasoning_content"]) == ("7", "hm, 7")
    assert state.messages()[1] == {"role": "assistant", "content": "7"}
    assert "hm" not in state.text()
    streamed = think.run(stream=True)
    assert "hm, 7" in "".join(streamed.text_iter())  # shown already: left as it is
    with pytest.raises(ValueError, match="needs a name"):
        sgl.separate_reasoning(sgl.gen(), "qwen3")


def test_reasoning_of_an_unknown_family(fake: FakeBackend) -> None:
    @sgl.function
    def think(s: Any) -> None:
        s += sgl.separate_reasoning(sgl.gen("a"), model_type="nothing")

    with pytest.raises(RequestError, match="model_type is 'nothing'; it must be one of gpt-oss"):
        think.run().text()


def test_images(fake: FakeBackend, tmp_path: Path) -> None:
    file = tmp_path / "i.png"
    file.write_bytes(b"\x89PNG rest")

    @sgl.function
    def look(s: Any) -> None:
        s += sgl.user(sgl.image(str(file)) + "what is it?")
        s += sgl.assistant(sgl.gen("a"))

    with pytest.raises(RequestError, match="FakeBackend does not support images: it takes text only"):
        look.run().text()
    assert fake.calls == []
    fake.takes_images = True  # type: ignore[misc]
    state = look.run()
    assert "<image>what is it?" in state.text()
    text, image = state.messages()[0]["content"]
    assert text == {"type": "text", "text": "<image>what is it?"}
    assert image["image_url"]["url"].startswith("data:image/png;base64,iVBO")


def test_video_is_refused(fake: FakeBackend) -> None:
    @sgl.function
    def look(s: Any) -> None:
        s += sgl.video("film.mp4", 4)

    with pytest.raises(RequestError, match="does not support videos"):
        look.run().sync()


def test_use_thread_false_waits_with_each_append(fake: FakeBackend) -> None:
    seen = []

    @sgl.function
    def program(s: Any) -> None:
        s += sgl.gen("a")
        seen.append(len(fake.calls))
        s += sgl.gen("b")
        seen.append(len(fake.calls))

    program.run(use_thread=False)
    assert seen == [1, 2]


def test_backends(fake: FakeBackend) -> None:
    assert sgl.get_server_info() == {"version": "fake"}
    sgl.flush_cache()
    assert fake.flushed

    class Holder:
        endpoint = FakeBackend(lambda text: "held")

    @sgl.function
    def program(s: Any) -> None:
        s += sgl.gen("a")

    assert program.run(backend=Holder()).text() == "held"
    with pytest.raises(TypeError, match="'http://x' is no backend"):
        program.run(backend="http://x")
    sgl.set_default_backend(None)
    with pytest.raises(TypeError, match="no backend: call set_default_backend"):
        program.run()


def test_verbosity_prints_the_text(fake: FakeBackend, capsys: pytest.CaptureFixture[str]) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "shown"

    sgl.global_config.verbosity = 2
    try:
        program.run()
    finally:
        sgl.global_config.verbosity = 0
    assert capsys.readouterr().out == "shown\n"


def test_wrong_uses(fake: FakeBackend) -> None:
    with pytest.raises(TypeError, match="must be s"):
        sgl.function(lambda state: None)

    @sgl.function
    def program(s: Any) -> None:
        s += "x"

    state = program.run()
    with pytest.raises(ValueError, match="None was added"):
        state += None
    with pytest.raises(TypeError, match="takes text and expressions"):
        state += 3
    with pytest.raises(KeyError, match="sets no variable 'nothing'"):
        _ = state["nothing"]
    with pytest.raises(TypeError):
        program.run("too many")


def test_exported_names() -> None:
    assert all(getattr(sgl, name) is not None for name in sgl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'VertexAI'"):
        _ = sgl.VertexAI


def test_importing_the_language_loads_no_torch() -> None:
    import subprocess
    import sys

    script = (
        "import sys, trunkline as sgl; sgl.gen('x'); sgl.Runtime; sgl.OpenAI;"
        "assert not {'torch', 'transformers'} & sys.modules.keys(), 'loaded'"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
