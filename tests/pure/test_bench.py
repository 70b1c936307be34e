"""The benchmarks: what they report, counted on a tiny model or a stub. Nothing here asserts a time."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trunkline.bench import kernels
from trunkline.bench.offline import Options as OfflineOptions
from trunkline.bench.offline import Timeline, timed, with_pool
from trunkline.bench.report import percentile, random_prompts, rate, show, spread
from trunkline.bench.serving import Options, Sample, arrivals, measure, server_words, summary
from trunkline.bench.sse import HttpError, events, fetch
from trunkline.bench.startup import Options as StartupOptions
from trunkline.bench.startup import measure as measure_start
from trunkline.bench.startup import report as report_starts
from trunkline.cli.chat import Options as ChatOptions
from trunkline.cli.chat import Remote
from trunkline.cli.main import main
from trunkline.cli.make_model import make_model
from trunkline.config.cli import parse
from trunkline.config.flags import Args
from trunkline.config.resolve import load_config
from trunkline.types import RequestError

ISSUE_FIELDS = {
    "load_s", "steps", "prompt_tokens", "cached_tokens", "output_tokens", "total_s", "prefill_tokens_per_s",
    "decode_tokens_per_s", "output_tokens_per_s", "peak_rss_bytes", "version", "model", "config",
}  # fmt: skip
SPREAD = {"mean_ms", "p50_ms", "p90_ms", "p95_ms", "p99_ms"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model("tiny", folder)
    return folder


# ---------------------------------------------------------------------- arithmetic
def test_percentiles_interpolate() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([1.0], 99) == 1.0 and percentile([], 50) is None
    assert percentile([0.0, 10.0], 95) == 9.5
    assert spread("x", [0.001, 0.003]) == {
        "x_mean_ms": 2.0, "x_p50_ms": 2.0, "x_p90_ms": 2.8, "x_p95_ms": 2.9, "x_p99_ms": 2.98,
    }  # fmt: skip
    assert set(spread("x", []).values()) == {None}
    assert rate(10, 4.0) == 2.5 and rate(0, 1.0) is None and rate(1, 0.0) is None


def test_prompts_share_exactly_the_prefix() -> None:
    prompts = random_prompts(3, 5, 7, 1000, seed=1)
    assert prompts == random_prompts(3, 5, 7, 1000, seed=1) != random_prompts(3, 5, 7, 1000, seed=2)
    assert all(len(p) == 12 and p[:7] == prompts[0][:7] and max(p) < 985 for p in prompts)
    assert len({tuple(p[7:]) for p in prompts}) == 3


def test_arrivals_are_a_seeded_poisson_process() -> None:
    assert arrivals(3, None, 0) == [0.0, 0.0, 0.0]
    due = arrivals(2000, 10.0, 5)
    assert due == arrivals(2000, 10.0, 5) == sorted(due)
    assert 180 < due[-1] < 220  # 2,000 at 10 a second


def test_rates_split_where_the_last_request_got_its_first_token() -> None:
    early = Timeline(
        first=1.0, last=4.0, gaps=[1.0, 1.0, 1.0], arrivals=[(1.0, 1), (2.0, 1), (3.0, 1), (4.0, 1)]
    )
    late = Timeline(first=2.0, last=4.0, gaps=[2.0], arrivals=[(2.0, 1), (4.0, 3)])
    found = timed([early, late], 4.0, computed_prompt=50)
    assert found["prefill_tokens_per_s"] == 25.0
    assert found["decode_tokens_per_s"] == 2.5  # 1 + 1 + 3 tokens in two seconds
    assert found["output_tokens_per_s"] == 2.0
    assert found["ttft_mean_ms"] == 1500.0 and found["itl_mean_ms"] == 1250.0
    assert timed([Timeline(first=1.0, arrivals=[(1.0, 1)])], 1.0, 10)["decode_tokens_per_s"] is None


def test_results_are_shown_as_one_line_or_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    show({"a": 1234, "b": None, "config": {}}, as_json=True)
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and json.loads(line)["a"] == 1234
    show({"a": 1234, "b": None, "config": {}}, as_json=False)
    text = capsys.readouterr().out
    assert "1,234" in text and "config" not in text and "b " not in text


# ---------------------------------------------------------------------- offline
def test_offline_reports_every_field_and_exact_counts(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "bench offline --json --num-prompts 3 --input-len 20 --output-len 4 --shared-prefix-len 32 --seed 3"
    )
    flags = [
        "--model-path",
        str(tiny),
        "--max-total-tokens",
        "1024",
        "--cpu-threads",
        "1",
        "--page-size",
        "8",
    ]
    assert main([*words.split(), *flags]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) >= ISSUE_FIELDS | {f"{name}_{part}" for name in ("ttft", "itl") for part in SPREAD}
    assert result["prompt_tokens"] == 3 * 52 and result["output_tokens"] == 12
    assert result["cached_tokens"] == 2 * 32  # computed once, whoever came first
    assert result["computed_tokens"] == 3 * 52 - 64 + 3 * 3
    assert result["config"]["cache"]["page_size"] == 8 and result["model"] == str(tiny)
    assert min(result[name] for name in ("load_s", "total_s", "steps", "peak_rss_bytes", "ttft_p50_ms")) > 0


def test_offline_sizes_the_pool_for_the_workload_unless_told() -> None:
    options = OfflineOptions(num_prompts=3, input_len=20, output_len=4, shared_prefix_len=32, page_size=8)
    assert with_pool(options).max_total_tokens == 3 * 9 * 8
    for given in ({"max_total_tokens": 64}, {"kv_memory": 1 << 20}, {"mem_fraction_static": 0.5}):
        sized = replace(options, **given)  # type: ignore[arg-type]
        assert with_pool(sized) is sized


def test_offline_tells_what_cannot_run(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "offline", "--model-path", str(tiny), "--max-total-tokens", "256", "--cpu-threads", "1"]
    assert main([*words, "--input-len", "300", "--num-prompts", "1"]) == 2
    assert "300" in capsys.readouterr().err


# ---------------------------------------------------------------------- HTTP
Reply = Callable[[bytes], list[bytes]]


@asynccontextmanager
async def stub(reply: Reply) -> AsyncIterator[str]:
    """A server that answers each request with the given pieces, each flushed by itself."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(x.split(b":")[1]) for x in head.split(b"\r\n") if x.lower().startswith(b"content-length")
        )
        body = await reader.readexactly(length)
        with contextlib.suppress(ConnectionError):  # a client that has all it needs may leave
            for piece in reply(head + body):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def chunked(text: bytes, size: int) -> list[bytes]:
    """A 200 answer in HTTP chunks of `size` bytes."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    return [head, *(b"%x\r\n%s\r\n" % (len(p), p) for p in parts), b"0\r\n\r\n"]


def plain(status: str, body: bytes) -> list[bytes]:
    return [f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode(), body]


async def collect(reply: Reply) -> list[Any]:
    async with stub(reply) as url:
        return [event async for event in events(f"{url}/x?y=1", {"a": 1}, {"X-Test": "1"})]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
async def test_streams_read_the_same_however_they_are_cut(size: int) -> None:
    text = ': comment\n\ndata: {"n": 1}\n\ndata:{"n": "€ü"}\r\n\r\ndata: [DONE]\n\n'.encode()
    assert await collect(lambda request: chunked(text, size)) == [{"n": 1}, {"n": "€ü"}]
    assert await collect(lambda request: [b"HTTP/1.1 200 OK\r\n\r\n", text]) == [{"n": 1}, {"n": "€ü"}]


async def test_the_request_is_what_was_asked_for() -> None:
    seen: list[bytes] = []

    def reply(request: bytes) -> list[bytes]:
        seen.append(request)
        return chunked(b"data: [DONE]\n\n", 5)

    await collect(reply)
    assert (
        seen[0].startswith(b"POST /x?y=1 HTTP/1.1\r\n")
        and b"X-Test: 1" in seen[0]
        and seen[0].endswith(b'{"a": 1}')
    )


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        (plain("400 Bad Request", b'{"error": {"message": "too long"}}'), "HTTP 400: too long"),
        (plain("502 Bad Gateway", b"<html>"), "HTTP 502: <html>"),
        (chunked(b'data: {"error": {"message": "died"}}\n\n', 9), "died"),
        (chunked(b'data: {"n": 1}\n\n', 9), "without"),
    ],
)
async def test_failures_carry_the_servers_words(pieces: list[bytes], said: str) -> None:
    with pytest.raises(HttpError, match=said):
        await collect(lambda request: pieces)


async def test_pages_are_fetched() -> None:
    async with stub(lambda request: plain("200 OK", b"a\nb")) as url:
        assert await fetch(url, {}) == b"ab"


async def test_chat_with_a_server(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[Any] = []

    def reply(request: bytes) -> list[bytes]:
        if request.startswith(b"GET /v1/models"):
            return plain("200 OK", b'{"data": [{"id": "stub"}]}')
        asked.append(json.loads(request.split(b"\r\n\r\n", 1)[1]))
        deltas = [{"role": "assistant"}, {"content": "a"}, {"content": None}, {"content": "b"}]
        lines = [b"data: %s\n\n" % json.dumps({"choices": [{"delta": d}]}).encode() for d in deltas]
        return chunked(b"".join(lines) + b"data: [DONE]\n\n", 30)

    def talk(url: str) -> list[str]:
        remote = Remote(ChatOptions(url=url, max_tokens=7, api_key="k"))
        try:
            whole = list(remote.reply([{"role": "user", "content": "hi"}], True))
            cut = remote.reply([{"role": "user", "content": "hi"}], None)
            next(cut)
            cut.close()  # as Ctrl-C does
            return whole
        finally:
            remote.close()

    async with stub(reply) as url:
        assert await asyncio.to_thread(talk, url) == ["a", "b"]
    assert asked[0]["chat_template_kwargs"] == {"enable_thinking": True} and asked[0]["max_tokens"] == 7
    assert "chat_template_kwargs" not in asked[1]
    gc.collect()
    assert not caplog.records  # such as tasks that were left behind


# ---------------------------------------------------------------------- serving
def completions(fail: bool = False) -> Reply:
    """A model server that streams three tokens, one of them cached prompt; every other request may fail."""
    count = 0

    def reply(request: bytes) -> list[bytes]:
        nonlocal count
        if request.startswith(b"GET /v1/models"):
            return plain("200 OK", b'{"data": [{"id": "stub"}]}')
        count += 1
        if fail and count % 2:
            return plain("429 Too Many Requests", b'{"error": {"message": "queue full"}}')
        body = json.loads(request.split(b"\r\n\r\n", 1)[1])
        assert body["ignore_eos"] and body["stream"] and body["model"] == "stub"
        pieces = [{"choices": [{"text": "x"}]}] * 3
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 3}
        pieces += [{"choices": [], "usage": {**usage, "prompt_tokens_details": {"cached_tokens": 1}}}]
        return chunked(
            b"".join(b"data: %s\n\n" % json.dumps(p).encode() for p in pieces) + b"data: [DONE]\n\n", 40
        )

    return reply


async def test_serving_counts_what_the_server_says() -> None:
    async with stub(completions()) as url:
        options = Options(num_prompts=4, input_len=5, output_len=3, max_concurrency=2, request_rate=1000.0)
        result = await measure(options, url)
    assert (result["completed"], result["failed"], result["model"]) == (4, 0, "stub")
    assert (result["prompt_tokens"], result["cached_tokens"], result["output_tokens"]) == (20, 4, 12)
    assert set(result) >= {f"{name}_{part}" for name in ("ttft", "itl", "tpot", "e2e") for part in SPREAD}
    json.dumps(result)


async def test_serving_counts_failures_and_tells_the_first() -> None:
    async with stub(completions(fail=True)) as url:
        result = await measure(Options(num_prompts=4, input_len=5, output_len=3, max_concurrency=1), url)
    assert (result["completed"], result["failed"]) == (2, 2)
    assert "queue full" in str(result["first_error"])


def test_serving_latencies_count_from_when_a_request_was_due() -> None:
    samples = [Sample(ttft=1.0, total=3.0, gaps=[1.0, 1.0], output_tokens=3), Sample(error="x")]
    found = summary(samples, 4.0)
    assert (found["ttft_p50_ms"], found["tpot_p50_ms"], found["e2e_p50_ms"]) == (1000.0, 1000.0, 3000.0)
    assert found["requests_per_s"] == 0.25


def test_a_server_that_is_not_there_is_told(free_port: int) -> None:
    with pytest.raises(RequestError) as caught:
        asyncio.run(measure(Options(), f"http://127.0.0.1:{free_port}"))
    assert caught.value.code == "no_server" and caught.value.param == "--url"


def test_the_started_server_gets_the_engines_flags() -> None:
    words = (
        "--model-path m --page-size 4 --disable-radix-cache --tp 1 --num-prompts 3 --log-level error".split()
    )
    options = parse(words, Options)
    assert parse(server_words(options), Args) == Args(
        model_path="m", page_size=4, disable_radix_cache=True, log_level="error", accepted=("--tp 1",)
    )


def test_serving_starts_and_stops_a_server_of_its_own(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "bench serving --json --num-prompts 3 --input-len 8 --output-len 4 --cpu-threads 1"
    assert main([*words.split(), "--max-total-tokens", "512", "--model-path", str(tiny)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["completed"], result["failed"], result["output_tokens"]) == (3, 0, 12)
    assert result["load_s"] > 0 and result["peak_rss_bytes"] > 0


def test_a_server_that_cannot_start_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serving", "--model-path", "/no/such/model"]) == 2
    assert "ended with status 2" in capsys.readouterr().err


# ---------------------------------------------------------------------- kernels
def test_kernels_report_every_shape(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "COLD_BYTES", 1 << 16)
    monkeypatch.setattr(kernels, "LINEAR_SIZES", ((32, 64),))
    monkeypatch.setattr(kernels, "ROWS", (1, 4))
    monkeypatch.setattr(kernels, "ATTENTION_SHAPES", ((2, 1, 40), (1, 8, 16)))
    words = ["bench", "kernels", "--seconds", "0.001", "--cpu-threads", "1", "--dtype", "float32"]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(p["n"], p["k"], p["m"]) for p in result["linear"]] == [(32, 64, 1), (32, 64, 4)]
    assert [p["requests"] for p in result["attention"]] == [2, 1]
    for point in result["linear"] + result["attention"]:
        assert point["us"] > 0 and point["of_limit"] >= 0
    assert result["read_gb_per_s"] > 0 and result["peak_gflop_per_s"] > 0
    assert main(words) == 0
    assert "of_limit" in capsys.readouterr().out


# ---------------------------------------------------------------------- startup
@pytest.mark.slow
def test_the_memory_plan_bounds_what_a_start_takes(tmp_path: Path) -> None:
    """Weights are in memory once, also while they load: a second copy is more than may be extra."""
    folder = tmp_path / "model"
    make_model("qwen3-0.6b", folder)
    options = parse(["--model-path", str(folder), "--max-total-tokens", "1024"], StartupOptions)
    resolved = load_config(options)
    start = asyncio.run(measure_start(options))
    found: dict[str, Any] = report_starts(resolved, [start])
    assert found["first_token_s"] >= found["ready_s"] > 0
    assert 0 < found["extra_bytes"] < 500_000_000 < found["weight_bytes"]
    assert start.peak_rss_bytes < resolved.memory.needed


# ---------------------------------------------------------------------- grammar
def test_grammar_reports_every_constraint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "grammar", "--repeat", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in result["constraints"]] == ["json_schema", "json_object", "regex", "ebnf"]
    for row in result["constraints"]:
        assert 0 < row["mask_p50"] <= row["mask_p90"] <= row["mask_p99"]
        assert row["compile_ms"] > 0
