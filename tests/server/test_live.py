"""The whole server as a process, with a tiny random model, as users meet it (P3, P9, P12, P19)."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.conftest import find_free_port
from tests.server.live import Server
from tests.server.test_metrics import samples

MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    server = Server(tiny_model, "--served-model-name", "tiny", "--api-key", "k")
    server.http.headers["authorization"] = "Bearer k"
    yield server
    code, output = server.stop()
    assert code == 0, output
    assert "Traceback" not in output


@pytest.fixture
def user(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0)


def test_openai_client(user: openai.OpenAI) -> None:
    whole = user.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=12, seed=3, logprobs=True, top_logprobs=2, n=2
    )
    parts = user.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=12, seed=3, logprobs=True, top_logprobs=2, n=2,
        stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    texts, tokens, usage = ["", ""], [0, 0], None
    for part in parts:
        usage = part.usage or usage
        for choice in part.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += len(choice.logprobs.content or []) if choice.logprobs else 0
    assert texts == [choice.message.content for choice in whole.choices]
    assert tokens == [12, 12] and usage is not None and whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens == 24
    completion = user.completions.create(model="tiny", prompt="hello", max_tokens=4, logprobs=1)
    assert completion.choices[0].logprobs is not None
    assert [model.id for model in user.models.list()] == ["tiny"]


def test_openai_errors(user: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        user.completions.create(model="tiny", prompt="a", max_tokens=10**6)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_tokens")
    with pytest.raises(openai.NotFoundError):
        user.completions.create(model="other", prompt="a")
    with pytest.raises(openai.AuthenticationError):
        user.with_options(api_key="wrong").models.list()


def test_cached_tokens_and_flush(user: openai.OpenAI, server: Server) -> None:
    messages: list[Any] = [{"role": "user", "content": "the same long question " * 12}]
    assert server.http.post("/flush_cache").status_code == 200

    def cached(**extra: Any) -> int:
        answer = user.chat.completions.create(
            model="tiny", messages=messages, max_tokens=1, temperature=0, extra_body=extra
        )
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    assert cached() == 0
    assert cached() > 32
    assert cached(cache_salt="tenant") == 0
    assert cached(cache_salt="tenant") > 32
    server.http.post("/flush_cache")
    assert cached() == 0


def test_the_same_text_whatever_else_runs(server: Server) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 20, "temperature": 1.0, "seed": 11}

    def ask(i: int) -> str:
        other = {"max_tokens": 5 + i, "seed": i} if i % 2 else {}
        answer = server.http.post("/v1/chat/completions", json={**body, **other}).json()
        return str(answer["choices"][0]["message"]["content"])

    alone = ask(0)
    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(ask, range(32)))
    assert set(texts[::2]) == {alone}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [0.0, 0.3])
async def test_disconnect_gives_all_pages_back(server: Server, stream: bool, after: float) -> None:
    body = {"messages": MESSAGES, "max_tokens": 1500, "ignore_eos": True, "n": 3, "stream": stream}
    async with httpx.AsyncClient(base_url=server.url, headers=dict(server.http.headers)) as http:
        task = asyncio.create_task(http.post("/v1/chat/completions", json=body))
        if after:
            while await asyncio.to_thread(server.pages_in_use) < 4:
                await asyncio.sleep(0.01)
        await asyncio.sleep(after)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert server.wait(lambda: server.pages_in_use() == 0, 5) < 2


def test_abort_request(server: Server) -> None:
    body = {"messages": MESSAGES, "max_tokens": 1500, "ignore_eos": True, "rid": "mine"}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.http.post, "/v1/chat/completions", json=body)
        server.wait(lambda: server.pages_in_use() > 0, 5)
        server.http.post("/abort_request", json={"rid": "mine"})
        response = answer.result()
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "abort"
    server.wait(lambda: server.pages_in_use() == 0, 2)


def test_metrics_agree_with_the_core(server: Server) -> None:
    server.http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 4, "ignore_eos": True})
    server.wait(lambda: server.pages_in_use() == 0, 5)
    seen = samples(server.http.get("/metrics").text)
    core = server.http.get("/server_info").json()["internal_states"][0]
    assert seen["trunkline:num_requests_total"] == core["requests"]
    assert seen["trunkline:num_running_reqs"] == 0
    assert 0 < seen["trunkline:generation_tokens_total"] <= core["generated_tokens"]


def test_information(server: Server) -> None:
    info = server.http.get("/server_info").json()
    assert info["server"]["api_key"] == "set" and info["ready"]["vocab_size"] > 0
    assert info["startup_time"] > 0 and "--api-key '***'" in info["launch_command"]
    assert info["internal_states"][0]["last_gen_throughput"] >= 0
    assert server.http.get("/health_generate").json() == {"status": "ok"}
    assert server.http.get("/model_info").json()["is_generation"] is True


def test_death_and_restart_of_the_engine(tiny_model: Path) -> None:
    server = Server(tiny_model)
    body = {"messages": MESSAGES, "max_tokens": 1900, "ignore_eos": True}
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(server.http.post, "/v1/chat/completions", json=body)
        stream = pool.submit(server.http.post, "/v1/chat/completions", json={**body, "stream": True})
        server.wait(lambda: server.pages_in_use() >= 4, 10)
        died = time.monotonic()
        server.core().kill()
        refused = whole.result()
        assert "engine_dead" in stream.result().text
        assert time.monotonic() - died < 2
    assert refused.status_code == 503 and "SIGKILL" in refused.json()["error"]["message"]
    assert server.http.get("/health").status_code == 503
    later = server.http.post("/v1/chat/completions", json={**body, "max_tokens": 1})
    assert later.status_code == 503 and "retry-after" in later.headers
    server.wait(lambda: server.http.get("/health").status_code == 200, 90)
    assert server.http.post("/v1/chat/completions", json={**body, "max_tokens": 1}).status_code == 200
    assert server.stop()[0] == 0


def test_sigterm_finishes_what_runs(tiny_model: Path) -> None:
    server = Server(tiny_model)
    core = server.core()
    body = {"messages": MESSAGES, "max_tokens": 150, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.http.post, "/v1/chat/completions", json=body)
        server.wait(lambda: server.pages_in_use() > 0, 10)
        server.process.send_signal(signal.SIGTERM)
        assert answer.result().json()["usage"]["completion_tokens"] == 150
    code, output = server.stop()
    assert code == 0 and "Traceback" not in output
    assert not core.is_running()


@pytest.mark.slow
def test_what_runs_at_the_deadline_ends_with_what_it_has(tiny_model: Path) -> None:
    server = Server(tiny_model, "--drain-timeout", "1")
    body = {"prompt": "a", "n": 8, "max_tokens": 2000, "ignore_eos": True}
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(server.http.post, "/v1/completions", json=body)
        stream = pool.submit(server.http.post, "/v1/completions", json={**body, "stream": True})
        server.wait(lambda: server.pages_in_use() > 16, 10)
        server.process.send_signal(signal.SIGTERM)
        choices = whole.result().json()["choices"]
        assert stream.result().text.endswith("data: [DONE]\n\n")
    assert {choice["finish_reason"] for choice in choices} == {"abort"} and choices[0]["text"]
    code, output = server.stop()
    assert code == 0 and "Traceback" not in output


@pytest.mark.slow
def test_an_engine_that_keeps_dying_ends_the_server(tiny_model: Path) -> None:
    server = Server(tiny_model)
    for _ in range(3):
        server.core().kill()
        server.wait(lambda: server.http.get("/health").status_code == 503, 15)
        server.wait(lambda: server.http.get("/health").status_code == 200, 90)
    server.core().kill()
    server.process.wait(timeout=90)
    code, output = server.stop()
    assert code == 2
    assert "killed by SIGKILL" in output.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_while_starting(tiny_model: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "trunkline.cli.main", "serve", "--model-path", str(tiny_model)]
    process = subprocess.Popen(
        [*command, "--port", str(find_free_port())],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    children: list[psutil.Process] = []
    while not children:
        children = psutil.Process(process.pid).children()
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=90)
    assert "Traceback" not in output
    psutil.wait_procs(children, timeout=5)
    assert not any(child.is_running() for child in children)


def test_no_orphan_when_the_server_is_killed(tiny_model: Path) -> None:
    server = Server(tiny_model)
    core = server.core()
    server.process.kill()
    server.process.wait()
    gone, alive = psutil.wait_procs([core], timeout=5)
    assert gone and not alive
    server.stop()


def test_a_port_in_use_is_named(server: Server, tiny_model: Path) -> None:
    command = [sys.executable, "-m", "trunkline.cli.main", "serve", "--model-path", str(tiny_model)]
    done = subprocess.run([*command, "--port", str(server.port)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and f"port {server.port}" in done.stderr
