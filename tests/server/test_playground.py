"""The playground's routes: what they send, to whom, and what they keep from whom."""

from __future__ import annotations

import asyncio
import re
from importlib.resources import files

import httpx
import pytest

from tests.server.conftest import http_client, make_app, with_key
from tests.server.fake_client import FakeClient
from trunkline.config.schema import EngineConfig
from trunkline.server.gate import Gate
from trunkline.text.tokenizer import Tokenizer

BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
FOLDER = files("trunkline.server").joinpath("playground")


async def test_browsers_get_the_page_and_programs_an_index(http: httpx.AsyncClient) -> None:
    page = await http.get("/", headers=BROWSER)
    assert page.headers["content-type"] == "text/html; charset=utf-8" and "<title>" in page.text
    for accept in ("application/json", "*/*"):
        index = await http.get("/", headers={"accept": accept})
        assert index.json()["server"] == "trunkline" and index.headers["vary"] == "accept"


async def test_the_page_runs_under_a_strict_policy_and_loads_nothing_from_elsewhere(
    http: httpx.AsyncClient,
) -> None:
    page = await http.get("/", headers=BROWSER)
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script(?![^>]* src=)|<style|[^-]style=|\son[a-z]+=", page.text)
    names = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
    assert names
    for name in names:
        assert (await http.get(f"/{name}")).status_code == 200, name
    for entry in FOLDER.iterdir():
        if entry.name.endswith((".js", ".css", ".html")):
            text = entry.read_text()
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), (
                entry.name
            )
            addresses = set(re.findall(r"https?://[^\s\"'`)]+", text)) - {"http://www.w3.org/2000/svg"}
            assert not addresses, entry.name
            for module in re.findall(r'from "\./([^"]+)"', text):
                assert (await http.get(f"/playground/{module}")).status_code == 200, module


async def test_parts_of_the_page(http: httpx.AsyncClient) -> None:
    style = await http.get("/playground/style.css")
    assert style.headers["content-type"].startswith("text/css")
    again = await http.get("/playground/style.css", headers={"if-none-match": style.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    for name in ("__init__.py", "..%2Fpage.py", "nothing.js"):
        refused = await http.get(f"/playground/{name}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "not_found")


async def test_about_tells_the_defaults_that_hold(
    client: FakeClient, tokenizer: Tokenizer, config: EngineConfig
) -> None:
    async with http_client(make_app(client, tokenizer, config, temperature=0.6, top_k=20)) as http:
        about = (await http.get("/v1/playground/about")).json()
    assert (about["model"], about["chat"], about["tools"], about["thinking"]) == ("tiny", True, True, True)
    parameters = about["parameters"]
    assert parameters["temperature"] == {"default": 0.6, "raw": 1.0, "low": 0, "high": None}
    assert parameters["top_k"]["default"] == 20 and parameters["top_p"]["high"] == 1


async def test_the_prompt_of_a_chat_token_by_token(http: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    body = {"messages": [{"role": "user", "content": "hi 🎉"}]}
    tokens = (await http.post("/v1/playground/prompt", json=body)).json()["tokens"]
    assert tokenizer.decode([token for token, _ in tokens], skip_special_tokens=False) == (
        "<|im_start|>user\nhi 🎉<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokens[0][1] == "<|im_start|>"
    plain = await http.post("/v1/playground/prompt", json={"text": "hi"})
    assert plain.json() == {"tokens": [[74, tokenizer.token_text(74)], [75, tokenizer.token_text(75)]]}
    wrong = await http.post("/v1/playground/prompt", json={**body, "temprature": 1})
    assert wrong.json()["error"]["param"] == "temprature"


# ---------------------------------------------------------------------- the engine, live
async def test_numbers_for_users_and_texts_for_the_administrator(
    client: FakeClient, tokenizer: Tokenizer, config: EngineConfig
) -> None:
    async with http_client(make_app(client, tokenizer, with_key(config, "k"))) as http:
        assert (await http.get("/v1/live")).status_code == 401
        assert (await http.get("/v1/live/details")).status_code == 401
        http.headers["authorization"] = "Bearer k"
        counts, details = await http.get("/v1/live"), await http.get("/v1/live/details")
    assert "whose" not in counts.text and "text" not in counts.json()["edges"][1]
    assert details.json()["requests"][0]["rid"] == "whose" and details.json()["edges"][1]["text"]
    seen = counts.json()
    assert seen["requests"][0]["computed"] == 32 and seen["requests"][0]["edge"] == 2
    assert seen["edges"][1] == {"number": 2, "parent": 1, "tokens": 32, "locks": 1, "idle": 0, "hidden": 3}
    assert seen["num_edges"] == 5 and seen["gauges"]["pages_total"] == 64


async def test_only_news_of_steps_and_one_look_for_all_who_watch(
    http: httpx.AsyncClient, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = await asyncio.gather(*(http.get(f"/v1/live?since={since}") for since in (-1, 0, 2)))
    assert [[step["step"] for step in answer.json()["steps"]] for answer in answers] == [
        [0, 1, 2],
        [1, 2],
        [],
    ]
    assert client.looks == 1
    monkeypatch.setattr("trunkline.server.live.FRESH", 0.0)
    await http.get("/v1/live")
    assert client.looks == 2
    refused = await http.get("/v1/live?since=x")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_type")


async def test_an_engine_that_does_not_answer(
    app: Gate, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trunkline.server.live.CORE_TIME", 0.01)
    monkeypatch.setattr(client, "snapshot", lambda: asyncio.sleep(1))
    async with http_client(app) as http:
        refused = await http.get("/v1/live")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_busy")


# ---------------------------------------------------------------------- dictated tokens
async def test_dictated_tokens_are_marked(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.tokens_per_message, client.forced = 3, [0, 2]
    native = await http.post(
        "/generate", json={"text": "hi", "return_forced": True, "sampling_params": {"regex": "x*"}}
    )
    total = native.json()["meta_info"]["completion_tokens"]
    expected = [at for at in range(total) if at % 3 != 1]
    assert native.json()["meta_info"]["forced"] == expected
    chat = {"messages": [{"role": "user", "content": "hi"}], "regex": "x*", "logprobs": True}
    entries = (await http.post("/v1/chat/completions", json=chat)).json()["choices"][0]["logprobs"]["content"]
    assert [at for at, entry in enumerate(entries) if entry.get("forced")] == expected
    plain = await http.post("/generate", json={"text": "hi"})
    assert "forced" not in plain.json()["meta_info"]
