"""The load test: what it sends, when, and what it makes of the answers. No time is asserted."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pure.lang.fake_server import FakeServer
from trunkline.bench.client import Sample
from trunkline.bench.datasets import Session, Shape, Turn, agents, arrivals, conversations
from trunkline.bench.dialects import DIALECTS, Usage
from trunkline.bench.server import server_words
from trunkline.bench.serving import Options, load_sessions, measure, read_goals, run, summary
from trunkline.cli.chat import Options as ChatOptions
from trunkline.cli.chat import Remote
from trunkline.cli.main import main
from trunkline.config.cli import parse
from trunkline.config.flags import Args
from trunkline.types import RequestError

PARTS = ("mean_ms", "p50_ms", "p90_ms", "p95_ms", "p99_ms")


class Model(FakeServer):
    """Streams three tokens in the interface that it is asked in; one prompt token is cached. Every `fails`th
    request is refused."""

    def __init__(self, fails: int = 0) -> None:
        super().__init__(self.reply)
        self.fails = fails
        self.bodies: list[dict[str, Any]] = []

    def reply(self, path: str, body: Any) -> Any:
        if path == "/v1/models":
            return 200, {"data": [{"id": "stub"}]}
        if path == "/flush_cache":
            return 200, {}
        self.bodies.append(body)
        if self.fails and len(self.bodies) % self.fails == 0:
            return 429, {"error": {"message": "queue full", "code": "queue_full"}}
        if path == "/generate":
            prompt = body.get("input_ids", body.get("text"))
            meta = {"prompt_tokens": len(prompt), "cached_tokens": 1}
            ids = [7, 8, 9]
            return [
                {"text": "abc"[:n], "output_ids": ids[:n], "meta_info": {**meta, "completion_tokens": n}}
                for n in (1, 2, 3)
            ]
        usage = {
            "prompt_tokens": len(body.get("prompt", "x")),
            "completion_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 1},
        }
        choices = [
            {"text": c} if path.endswith("/v1/completions") else {"delta": {"content": c}} for c in "abc"
        ]
        return [*({"choices": [choice]} for choice in choices), {"choices": [], "usage": usage}]


def measured(server: Model, **given: Any) -> tuple[dict[str, Any], list[Sample]]:
    options = Options(**{"input_len": 5, "output_len": 3, "warmup_requests": 0, **given})
    with server.running():
        url = server.url
        return asyncio.run(
            measure(options, load_sessions(options), read_goals(options.goodput), url)  # type: ignore[arg-type]
        )


# ---------------------------------------------------------------------- what is sent
def test_arrivals_have_the_rate_that_was_asked_for() -> None:
    assert arrivals(3, None, 0) == [0.0, 0.0, 0.0]
    due = arrivals(2000, 10.0, 5)
    assert due == arrivals(2000, 10.0, 5) == sorted(due)
    assert 180 < due[-1] < 220  # 2,000 at 10 a second
    assert arrivals(3, 2.0, 1, kind="constant") == [0.0, 0.5, 1.0]
    bursts = arrivals(2000, 10.0, 5, kind="burst", burst=8)
    assert len(set(bursts)) == 250 and bursts[0] == bursts[7] < bursts[8] and 150 < bursts[-1] < 250


def test_sessions_share_exactly_their_groups_prefix() -> None:
    shape = Shape(count=6, input_len=5, output_len=4, groups=2, prefix_len=7, vocabulary=1000, seed=1)
    sessions = conversations(shape)
    assert sessions == conversations(shape)
    prompts = [session.turns[0].content for session in sessions]
    assert all(len(p) == 12 and p[:7] == prompts[i % 2][:7] for i, p in enumerate(prompts))
    assert prompts[0][:7] != prompts[1][:7] and len({tuple(p) for p in prompts}) == 6
    assert max(max(p) for p in prompts) < 985  # special tokens live above


def test_lengths_turns_and_pauses() -> None:
    shape = Shape(count=50, input_len=100, output_len=40, range_ratio=0.5, turns=3, pause=2.0)
    turns = [turn for session in conversations(shape) for turn in session.turns]
    assert len(turns) == 150
    assert {len(t.content) >= 50 for t in turns} == {True} and len({len(t.content) for t in turns}) > 20
    assert min(t.output_len for t in turns) >= 20 and max(t.output_len for t in turns) <= 40
    assert sum(t.pause == 0 for t in turns) == 50  # first turns
    steps = [len(session.turns) for session in agents(shape)]
    assert (min(steps), max(steps)) == (1, 5)


def test_files_are_read(tmp_path: Path) -> None:
    custom = tmp_path / "custom.jsonl"
    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    lines = [{"prompt": [1, 2], "output_len": 9, "timestamp": 4.0}, {"messages": chat, "timestamp": 2.0}]
    lines += [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]}]
    custom.write_text("\n\n".join(map(json.dumps, lines)))
    options = {"dataset": "custom", "dataset_path": str(custom)}
    first, second, third = load_sessions(Options(**options, output_len=3))  # type: ignore[arg-type]
    assert first == Session(0.0, [Turn([1, 2], 9)])
    assert second == Session(0.0, [Turn("a", 3), Turn("c", 3)], "s")
    assert third.turns == [Turn("q", 3)]
    timed = load_sessions(Options(**options, num_prompts=2, arrival="trace", trace_speed=2.0))  # type: ignore[arg-type]
    assert [session.due for session in timed] == [1.0, 0.0]

    trace = tmp_path / "trace.jsonl"
    rows = [(0, 600, [1, 2]), (500, 1300, [1, 2, 3])]
    trace.write_text(
        "\n".join(
            json.dumps({"timestamp": at, "input_length": n, "output_length": 2, "hash_ids": ids})
            for at, n, ids in rows
        )
    )
    a, b = load_sessions(Options(dataset="trace", dataset_path=str(trace), arrival="trace"))
    assert (a.due, b.due) == (0.0, 0.5)
    assert (len(a.turns[0].content), len(b.turns[0].content)) == (600, 1300)
    assert a.turns[0].content == b.turns[0].content[:600]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2: it is not JSON"),
        ("[]", "no JSON object"),
        ("{}", "it needs"),
        ('{"prompt": 3}', "it needs"),
    ],
)
def test_bad_lines_are_told(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "x"
    path.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(RequestError, match=told) as caught:
        load_sessions(Options(dataset="custom", dataset_path=str(path)))
    assert caught.value.code == "invalid_dataset"


@pytest.mark.parametrize(
    ("words", "param"),
    [
        ("--dataset custom", "--dataset-path"),
        ("--dataset-path x", "--dataset-path"),
        ("--dataset trace --dataset-path /no/such/file", "--dataset-path"),
        ("--arrival trace", "--arrival"),
        ("--arrival burst", "--request-rate"),
        ("--goodput ttft", "--goodput"),
        ("--goodput ttft:-1", "--goodput"),
        ("--goodput latency:4", "--goodput"),
        ("--extra-request-body [1]", "--extra-request-body"),
        ("--plot x.jpg", "--plot"),
    ],
)
def test_flags_that_do_not_fit_are_refused_before_anything_starts(words: str, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        run(["--url", "http://127.0.0.1:9", *words.split()])
    assert caught.value.param == param


# ---------------------------------------------------------------------- the interfaces
@pytest.mark.parametrize("dialect", DIALECTS)
def test_each_interface_says_what_was_said_before(dialect: str) -> None:
    server = Model()
    result, samples = measured(server, backend=dialect, dataset="multi-turn", turns=2, num_prompts=1)
    assert (result["completed"], result["output_tokens"], result["cached_tokens"]) == (2, 6, 2)
    first, second = server.bodies
    if dialect in ("trunkline", "sglang"):
        assert len(first["input_ids"]) == 5
        assert second["input_ids"][:8] == [*first["input_ids"], 7, 8, 9] and len(second["input_ids"]) == 13
        assert first["sampling_params"] == {"max_new_tokens": 3, "temperature": 0.0, "ignore_eos": True}
    elif dialect == "openai":
        assert second["prompt"].startswith(first["prompt"] + "abc ") and first["model"] == "stub"
    else:
        assert [m["role"] for m in second["messages"]] == ["user", "assistant", "user"]
        assert second["messages"][:2] == [*first["messages"], {"role": "assistant", "content": "abc"}]
    assert all(len(sample.gaps) == 2 and sample.error is None for sample in samples)


def test_text_prompts_and_systems() -> None:
    session = Session(0.0, [Turn("a", 1), Turn([5], 1)], "sys ")
    native = DIALECTS["trunkline"](session, "m")
    assert native.body("a", 1)["text"] == "sys a"
    native.read(
        {"text": "b", "output_ids": [1], "meta_info": {"prompt_tokens": 1, "completion_tokens": 1}}, Usage()
    )
    assert native.body([5], 1)["text"] == "sys ab 5"
    chat = DIALECTS["openai-chat"](session, "m")
    assert chat.body("a", 1)["messages"][0] == {"role": "system", "content": "sys "}


def test_single_requests_are_token_ids_and_take_more_fields() -> None:
    server = Model()
    measured(server, num_prompts=1, extra_request_body='{"cache_salt": "s"}', flush_cache=True)
    assert len(server.bodies[0]["prompt"]) == 5 and server.bodies[0]["cache_salt"] == "s"
    assert [path for path, *_ in server.requests].count("/flush_cache") == 1


# ---------------------------------------------------------------------- the answers
def test_counts_are_what_the_server_says() -> None:
    result, samples = measured(Model(), num_prompts=4, max_concurrency=2, request_rate=1000.0)
    assert (result["completed"], result["failed"], result["model"]) == (4, 0, "stub")
    assert (result["prompt_tokens"], result["cached_tokens"], result["output_tokens"]) == (20, 4, 12)
    assert set(result) >= {f"{name}_{part}" for name in ("ttft", "itl", "tpot", "e2e") for part in PARTS}
    assert [sample.due for sample in samples] == sorted(sample.due for sample in samples)
    json.dumps(result)


def test_failures_are_counted_and_the_first_is_told() -> None:
    result, _ = measured(Model(fails=2), num_prompts=4, max_concurrency=1)
    assert (result["completed"], result["failed"]) == (2, 2)
    assert "queue full" in result["first_error"] and result["errors"] == {"queue_full": 2}


def test_a_session_ends_with_its_first_failure() -> None:
    server = Model(fails=2)
    result, _ = measured(server, dataset="multi-turn", turns=4, num_prompts=1)
    assert (result["completed"], result["failed"], len(server.bodies)) == (1, 1, 2)


def test_several_client_processes_send_every_session_once() -> None:
    server = Model()
    result, _ = measured(server, num_prompts=5, processes=2, max_concurrency=3)
    assert (result["completed"], result["output_tokens"]) == (5, 15)
    sent = {tuple(body["prompt"]) for body in server.bodies}
    shape = Shape(count=5, input_len=5, output_len=3)
    assert sent == {tuple(session.turns[0].content) for session in conversations(shape)}


def test_latencies_count_from_when_a_request_was_due() -> None:
    samples = [
        Sample(ttft=1.0, total=3.0, gaps=[1.0, 1.0], output_tokens=3),
        Sample(ttft=0.5, total=4.5, gaps=[2.0, 2.0], output_tokens=3),
        Sample(error="x", code="y"),
    ]
    found = summary(samples, 4.0, read_goals("ttft:1000, tpot:1500"))
    assert (found["ttft_p50_ms"], found["tpot_p50_ms"], found["e2e_p50_ms"]) == (750.0, 1500.0, 3750.0)
    assert found["requests_per_s"] == 0.5 and found["mean_concurrency"] == 1.88
    assert (found["goodput_requests_per_s"], found["goodput_share"]) == (0.25, 0.3333)
    assert summary(samples, 4.0, {})["goodput_share"] is None


def test_requests_and_pictures_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    server, rows, picture = Model(fails=3), tmp_path / "rows.jsonl", tmp_path / "picture.svg"
    with server.running():
        words = (
            f"bench serving --json --url {server.url} --num-prompts 4 --warmup-requests 0 --plot {picture}"
        )
        assert main([*words.split(), "--output-file", str(rows)]) == 1  # one failed
    assert json.loads(capsys.readouterr().out)["completed"] == 3
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["error"] is None for row in found].count(True) == 3 and all("ttft" in row for row in found)
    assert "time to first token" in picture.read_text() or "<svg" in picture.read_text()


def test_a_server_that_is_not_there_is_told(free_port: int) -> None:
    with pytest.raises(RequestError) as caught:
        asyncio.run(measure(Options(), [], {}, f"http://127.0.0.1:{free_port}"))
    assert caught.value.code == "no_server" and caught.value.param == "--url"


# ---------------------------------------------------------------------- a server of its own
def test_the_started_server_gets_the_engines_flags() -> None:
    words = (
        "--model-path m --page-size 4 --disable-radix-cache --tp 1 --num-prompts 3 --log-level error".split()
    )
    options = parse(words, Options)
    assert parse(server_words(options), Args) == Args(
        model_path="m", page_size=4, disable_radix_cache=True, log_level="error", accepted=("--tp 1",)
    )


@pytest.mark.parametrize("dialect", ["trunkline", "openai"])
def test_a_server_is_started_measured_and_stopped(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], dialect: str
) -> None:
    words = "bench serving --json --num-prompts 3 --input-len 30 --output-len 5 --cpu-threads 1"
    words += f" --dataset multi-turn --turns 2 --max-total-tokens 512 --page-size 4 --backend {dialect}"
    assert main([*words.split(), "--model-path", str(tiny_model)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["completed"], result["failed"], result["output_tokens"]) == (6, 0, 30)
    assert result["load_s"] > 0 and result["peak_rss_bytes"] > 0
    if (
        dialect == "trunkline"
    ):  # the second turn begins with all that the server has of the first, by the token
        assert result["cached_tokens"] == 3 * 32  # full pages of 30 + 5 tokens, of which the last has no KV


def test_a_server_that_cannot_start_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serving", "--model-path", "/no/such/model"]) == 2
    assert "ended with status 2" in capsys.readouterr().err


# ---------------------------------------------------------------------- trunkline chat --url
def test_chat_with_a_server(caplog: pytest.LogCaptureFixture) -> None:
    deltas = [{"role": "assistant"}, {"reasoning_content": "hm"}, {"reasoning": "mm"}]
    deltas += [{"content": "a"}, {"content": None}, {"content": "b"}]
    reply: Callable[[str, Any], Any] = lambda path, body: (  # noqa: E731
        (200, {"data": [{"id": "stub"}]})
        if path == "/v1/models"
        else [{"choices": [{"delta": d}]} for d in deltas]
    )
    server = FakeServer(reply)
    with server.running():
        remote = Remote(ChatOptions(url=server.url, max_tokens=7, api_key="k"))
        try:
            pieces = list(remote.reply([{"role": "user", "content": "hi"}], True))
            assert [thought for thought, _ in pieces if thought] == ["hm", "mm"]
            assert [answer for _, answer in pieces if answer] == ["a", "b"]
            cut = remote.reply([{"role": "user", "content": "hi"}], None)
            next(cut)
            cut.close()  # as Ctrl-C does
        finally:
            remote.close()
    asked = [body for path, body, *_ in server.requests if path != "/v1/models"]
    assert asked[0]["chat_template_kwargs"] == {"enable_thinking": True} and asked[0]["max_tokens"] == 7
    assert "chat_template_kwargs" not in asked[1]
    gc.collect()
    assert not caplog.records  # such as tasks that were left behind
