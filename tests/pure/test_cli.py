"""The program: commands, errors in one line, nothing heavy loaded for help."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import trunkline
from trunkline.cli import chat, doctor, make_model, serve
from trunkline.cli.main import COMMANDS, main
from trunkline.config.cli import parse
from trunkline.config.model_spec import load_model_spec
from trunkline.types import RequestError

SOURCE = str(Path(trunkline.__file__).parents[1])


def python(*words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": SOURCE}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=env, timeout=60, check=False
    )


# ---------------------------------------------------------------------- the program
def test_help_overview_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command.name in text and command.about in text for command in COMMANDS)
    assert main([]) == 2
    capsys.readouterr()
    assert main(["version"]) == main(["--version"]) == 0
    assert capsys.readouterr().out.split() == [trunkline.__version__] * 2


def test_help_of_everything_loads_no_torch() -> None:
    pages = [["--help"], *([c.name, "--help"] for c in COMMANDS if c.name != "version")]
    pages += [["bench", kind, "--help"] for kind in ("offline", "serving", "kernels")]
    script = (
        "import sys\nfrom trunkline.cli.main import main\n"
        f"for words in {pages!r}:\n    assert main(words) == 0, words\n"
        "heavy = {'torch', 'numpy', 'starlette', 'tokenizers', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = python("-W", "error", "-c", script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["serv"], "did you mean serve?"),
        (["serve", "--page-sise", "3"], "did you mean --page-size?"),
        (["serve", "--tp", "2"], "--tp 2 is not built"),
        (["serve", "--trust-remote-code"], "--trust-remote-code is not supported"),
        (
            ["serve", "--model-path", "/no/such/model", "--port", "{port}"],
            "there is no folder '/no/such/model'",
        ),
        (["serve", "--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["chat", "--url", "http://127.0.0.1:{port}"], "does not answer"),
        (["bench"], "choose offline, serving, overhead, startup, scheduler, kernels or grammar"),
        (["bench", "x"], "choose offline, serving, overhead, startup, scheduler, kernels or grammar"),
        (["bench", "offline", "--num-prompts", "0"], "--num-prompts must be at least 1"),
        (["make-model", "--out", "x"], "--shape is needed"),
        (["make-model", "--shape", "tiny"], "--out is needed"),
        (["version", "x"], "unexpected argument"),
    ],
)
def test_what_cannot_start_ends_with_one_line_and_status_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], free_port: int
) -> None:
    assert main([word.replace("{port}", str(free_port)) for word in words]) == 2
    caught = capsys.readouterr()
    assert said in caught.err and len(caught.err.splitlines()) == 1 and not caught.out


def test_the_reference_way_to_start_is_serve() -> None:
    ours, theirs = (
        python("-m", "trunkline.cli.main", "serve", "--help"),
        python("-m", "trunkline.launch_server", "--help"),
    )
    assert ours.returncode == theirs.returncode == 0
    assert ours.stdout == theirs.stdout and "--model-path" in ours.stdout
    done = python("-m", "trunkline.launch_server", "--no-such-flag")
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_an_interrupt_and_a_closed_pipe_end_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "run", interrupted)
    assert main(["serve"]) == 130


# ---------------------------------------------------------------------- serve
def test_a_port_in_use_is_known_before_loading(free_port: int) -> None:
    serve.check_port("127.0.0.1", free_port)
    serve.check_port("127.0.0.1", free_port)  # the check itself leaves it free
    owner = f"port {free_port}.*in use by process {os.getpid()}"
    with socket.create_server(("127.0.0.1", free_port)), pytest.raises(RequestError, match=owner) as caught:
        serve.check_port("127.0.0.1", free_port)
    assert caught.value.code == "port_in_use" and "--port" in caught.value.message


def test_serve_prints_plan_and_reasons_and_runs_the_server(
    tiny: Path, free_port: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trunkline.server import app

    ran: list[Any] = []
    monkeypatch.setattr(app, "run_server", ran.append)
    words = ["serve", "--model-path", str(tiny), "--port", str(free_port), "--enable-metrics"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert (
        "memory plan (cpu)" in out
        and "KV pool" in out
        and "--enable-metrics: /metrics is always served" in out
    )
    assert "scheduler.max_context = 2048" in out
    assert main([*words, "--log-level", "error"]) == 0
    assert capsys.readouterr().out == ""
    assert [r.config.server.port for r in ran] == [free_port] * 2


# ---------------------------------------------------------------------- doctor
def test_doctor_says_whether_serve_would_start(
    tiny: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["doctor", "--model-path", str(tiny), "--port", str(free_port)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "can start" in out and "memory plan" in out and "torch" in out and "FAULT" not in out
    with socket.create_server(("127.0.0.1", free_port)):
        assert main(words) == 1
    out = capsys.readouterr().out
    assert "FAULT  port" in out and "1 fault found" in out
    assert main(["doctor", "--model-path", "/no/such/model", "--port", str(free_port)]) == 1
    assert "FAULT  model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "level"),
    [("2.13.0+cpu", "ok"), ("2.11.1", "ok"), ("2.10.0", "fault"), ("2.15.0", "fault"), (None, "fault")],
)
def test_doctor_knows_which_torch_is_tested(version: str | None, level: str) -> None:
    finding = doctor.torch_finding(version)
    assert finding.level == level and bool(finding.advice) == (level == "fault")


# ---------------------------------------------------------------------- make-model
@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model.make_model("tiny", folder)
    return folder


def test_made_models_load_in_transformers_and_here(tiny: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tiny))
    model = AutoModelForCausalLM.from_pretrained(str(tiny))
    spec = load_model_spec(str(tiny))
    assert sum(p.numel() for p in model.parameters()) == spec.weight_count
    assert len(tokenizer) == spec.vocab_size == 512
    text = 'Hello, {"a": 1}\n\t€ 語'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == spec.eos_token_ids[0] == 511


def test_making_is_seeded(tiny: Path, tmp_path: Path) -> None:
    make_model.make_model("tiny", tmp_path / "same")
    make_model.make_model("tiny", tmp_path / "other", seed=1)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "same" / name).read_bytes() == (tiny / name).read_bytes()
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != (
        tiny / "model.safetensors"
    ).read_bytes()


def test_big_models_are_written_in_shards(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import safe_open

    monkeypatch.setattr(make_model, "SHARD_BYTES", 150_000)
    make_model.make_model("tiny", tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    whole = safe_open(str(tiny / "model.safetensors"), "pt")
    assert set(index["weight_map"]) == set(whole.keys()) and len(set(index["weight_map"].values())) >= 3
    for name, file in index["weight_map"].items():
        assert safe_open(str(tmp_path / file), "pt").get_tensor(name).equal(whole.get_tensor(name))
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "parameters", "kv_bytes"),
    [("qwen3-0.6b", 596_049_920, 114_688), ("llama-3.2-1b", 1_235_814_400, 32_768)],
)
def test_shapes_are_those_of_the_models(name: str, parameters: int, kv_bytes: int) -> None:
    shape = make_model.shape_named(name)
    sizes = [dims[0] * (dims[1] if len(dims) > 1 else 1) for _, dims in shape.tensors()]
    assert sum(sizes) == parameters
    assert 2 * shape.layers * shape.kv_heads * shape.head_dim * 2 == kv_bytes


@pytest.mark.parametrize("chat_name", ["chatml", "llama3"])
def test_tokenizers_have_exactly_the_size_asked_for(chat_name: str) -> None:
    kind = make_model.chat_named(chat_name)
    tokenizer = make_model.make_tokenizer(5000, kind, 0)
    assert tokenizer.get_vocab_size() == 5000
    ids = tokenizer.encode("the user: naïve\n").ids
    assert (tokenizer.token_to_id(kind.special[0]) == ids[0]) == (chat_name == "llama3")
    assert tokenizer.decode(ids) == "the user: naïve\n"
    assert [tokenizer.token_to_id(token) for token in kind.special] == list(
        range(5000 - len(kind.special), 5000)
    )


def test_nothing_is_overwritten(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="not an empty folder"):
        make_model.make_model("tiny", tiny)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(make_model.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RequestError, match=r"416\.5 KiB short"):
        make_model.make_model("tiny", tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------- chat
class Echo:
    """Says what it was sent; fails or is interrupted on demand."""

    name = "echo"

    def __init__(self) -> None:
        self.calls: list[tuple[list[dict[str, str]], bool | None]] = []

    def reply(self, messages: list[dict[str, str]], think: bool | None) -> Iterator[chat.Piece]:
        self.calls.append((list(messages), think))
        said = messages[-1]["content"]
        if said == "fail":
            raise RequestError("too long", code="context_too_long")
        yield chat.Piece("", "you said ")
        if said == "interrupt":
            raise KeyboardInterrupt
        yield chat.Piece("", said)

    def close(self) -> None:
        pass


def converse(
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    talk: chat.Conversation | None = None,
    echo: Echo | None = None,
) -> Echo:
    echo, left = echo or Echo(), iter(lines)

    def read(prompt: str = "") -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    chat.converse(echo, talk or chat.Conversation())
    return echo


def test_chat_keeps_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    echo = converse(["one", "", "two", "/reset", "three"], monkeypatch, chat.Conversation(system="be kind"))
    system = {"role": "system", "content": "be kind"}
    said = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "you said one"}]
    assert [messages for messages, _ in echo.calls] == [
        [system, said[0]],
        [system, *said, {"role": "user", "content": "two"}],
        [system, {"role": "user", "content": "three"}],
    ]
    assert capsys.readouterr().out == "you said one\nyou said two\nyou said three\n"


def test_chat_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    echo = converse(
        ["/think", "a", "/think", "/system new", "b", "/nope", "/help", "/quit", "c"], monkeypatch
    )
    assert [think for _, think in echo.calls] == [True, False]
    assert echo.calls[1][0][0] == {"role": "system", "content": "new"} and len(echo.calls[1][0]) == 2
    out = capsys.readouterr().out
    assert "thinking is on" in out and "thinking is off" in out and "no command /nope" in out


def test_a_failed_turn_is_forgotten_and_a_cut_one_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    echo = converse(["fail", "interrupt", "more"], monkeypatch)
    assert [m["content"] for m in echo.calls[-1][0]] == ["interrupt", "you said ", "more"]


def test_chat_shows_the_reasoning_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Thinker(Echo):
        def reply(self, messages: list[chat.Message], think: bool | None) -> Iterator[chat.Piece]:
            self.calls.append((list(messages), think))
            yield from (chat.Piece("what", ""), chat.Piece(" if", ""))
            if messages[-1]["content"] == "interrupt":
                raise KeyboardInterrupt
            yield from (chat.Piece("?", "so"), chat.Piece("", " be it"))

    lines = ["hm", "interrupt", "more"]
    echo = converse(lines, monkeypatch, echo=Thinker())
    marked = "[reasoning]\nwhat if?\n[/reasoning]\nso be it\n"
    cut = "[reasoning]\nwhat if\n[/reasoning]\n\n"
    assert capsys.readouterr().out == marked + cut + marked
    assert [m["content"] for m in echo.calls[-1][0]] == ["hm", "so be it", "interrupt", "", "more"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    converse(["hm"], monkeypatch, echo=Thinker())
    assert capsys.readouterr().out == "\033[2mwhat if?\033[0m\nso be it\n"


@pytest.mark.parametrize("thinks", [True, False])
def test_chat_in_this_process_tells_reasoning_by_the_template(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], thinks: bool
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}" + ("<think>" if thinks else "</think>"))
    words = [
        "--model-path",
        str(tiny),
        "--max-total-tokens",
        "512",
        "--cpu-threads",
        "1",
        "--max-tokens",
        "5",
    ]
    words += ["--temperature", "0", "--chat-template", str(template), "--reasoning-parser", "qwen3"]
    talker = chat.Local(parse(words, chat.Options))
    try:
        pieces = list(talker.reply([{"role": "user", "content": "hello"}], None))
    finally:
        talker.close()
    thought, answer = ("".join(parts) for parts in zip(*pieces, strict=True))
    assert (bool(thought), bool(answer)) == (thinks, not thinks)


def test_chat_in_this_process(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["hello", "/think", "again"])

    def read(prompt: str = "") -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    words = [
        "chat",
        "--model-path",
        str(tiny),
        "--max-tokens",
        "5",
        "--temperature",
        "0",
        "--max-total-tokens",
        "512",
    ]
    assert main([*words, "--cpu-threads", "1"]) == 0
    out = capsys.readouterr().out
    assert len(out.strip()) > 10 and "cannot switch thinking" in out
