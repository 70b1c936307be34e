"""Who may use which route, from which page, and how many at once (P11, P14)."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import httpx
import msgspec
import pytest

from tests.server.conftest import http_client, make_app
from tests.server.fake_client import FakeClient
from trunkline.config.schema import EngineConfig, ServerConfig
from trunkline.server.endpoint import Access, Endpoint, RouteTable
from trunkline.server.gate import Gate
from trunkline.text.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}

# The whole inventory of what needs no key, and of what steers the server. All the rest needs the API key.
OPEN = {"/health", "/health_generate", "/ready", "/metrics", "/", "/playground/{name}"}
ADMIN = {
    "/abort_request",
    "/configure_logging",
    "/continue_generation",
    "/flush_cache",
    "/pause_generation",
    "/start_profile",
    "/stop_profile",
    "/v1/live/details",
}


@pytest.fixture
def make(client: FakeClient, tokenizer: Tokenizer, config: EngineConfig) -> Any:
    """An application with these settings of its server."""

    def build(**settings: Any) -> Gate:
        return make_app(client, tokenizer, msgspec.structs.replace(config, server=ServerConfig(**settings)))

    return build


def inventory(app: Gate) -> list[tuple[str, str, Access]]:
    return [(e.path, method, e.access) for e in app.table.endpoints for method in e.methods]


async def status(http: httpx.AsyncClient, method: str, path: str, key: str | None) -> int:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return (await http.request(method, path, headers=headers)).status_code


def test_a_route_says_who_may_use_it() -> None:
    (access,) = [field for field in dataclasses.fields(Endpoint) if field.name == "access"]
    assert access.default is dataclasses.MISSING and access.default_factory is dataclasses.MISSING


def test_the_inventory(app: Gate) -> None:
    routes = inventory(app)
    assert {path for path, _, access in routes if access is Access.OPEN} == OPEN
    assert {path for path, _, access in routes if access is Access.ADMIN} == ADMIN


async def test_without_keys_all_is_open(app: Gate) -> None:
    async with http_client(app) as http:
        for path, method, _ in inventory(app):
            assert await status(http, method, path, None) not in (401, 403), path


async def test_with_one_key_it_opens_all(make: Any) -> None:
    app = make(api_key="sekrit")
    async with http_client(app) as http:
        for path, method, access in [*inventory(app), ("/nope", "GET", Access.USER)]:
            for wrong in (None, "wrong", "", "sekri", "sekritt"):
                assert (await status(http, method, path, wrong) == 401) == (access is not Access.OPEN), path
            assert await status(http, method, path, "sekrit") not in (401, 403)
        basic = await http.post(CHAT, json=HI, headers={"authorization": "Basic sekrit"})
        assert basic.status_code == 401
        assert basic.headers["www-authenticate"] == "Bearer"
        assert basic.json()["error"]["code"] == "invalid_api_key"
        anthropic = await http.post(CHAT, json=HI, headers={"x-api-key": "sekrit"})
        assert anthropic.status_code == 200
        both = {"authorization": "Bearer other", "x-api-key": "sekrit"}
        assert (await http.post(CHAT, json=HI, headers=both)).status_code == 200


@pytest.mark.parametrize("user_key", ["user", None])
async def test_the_admin_key_keeps_others_from_steering(make: Any, user_key: str | None) -> None:
    app = make(api_key=user_key, admin_api_key="boss")
    async with http_client(app) as http:
        for path, method, access in inventory(app):
            seen = {key: await status(http, method, path, key) for key in (None, "user", "boss")}
            assert seen["boss"] not in (401, 403), path
            if access is Access.ADMIN:
                assert seen[None] == 401, path
                assert seen["user"] == (403 if user_key else 401), path
            elif access is Access.USER and user_key:
                assert seen[None] == 401 and seen["user"] not in (401, 403), path
            else:
                assert seen[None] not in (401, 403), path


async def test_keys_are_never_shown(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    app = make(api_key="sekrit-user", admin_api_key="sekrit-boss", ssl_keyfile_password="sekrit-pass")
    async with http_client(app) as http:
        for path, method, _ in inventory(app):
            for key in ("sekrit-user", "sekrit-boss"):
                answer = await http.request(method, path, headers={"authorization": f"Bearer {key}"}, json={})
                assert "sekrit" not in answer.text + str(answer.headers), path
        info = (await http.get("/server_info", headers={"x-api-key": "sekrit-user"})).json()["server"]
    assert info["api_key"] == info["admin_api_key"] == info["ssl_keyfile_password"] == "set"
    assert "sekrit" not in caplog.text


# ---------------------------------------------------------------------- browsers
async def test_pages_of_other_sites_may_neither_read_nor_steer(make: Any) -> None:
    async with http_client(make()) as http:
        answer = await http.get("/v1/models", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in answer.headers
        answer = await http.post(CHAT, json=HI, headers={"origin": "https://evil.example"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_not_allowed")
        assert (await http.post(CHAT, json=HI, headers={"origin": "http://test"})).status_code == 200
        assert (await http.options(CHAT)).status_code == 405


async def test_allowed_origins(make: Any) -> None:
    app = make(api_key="k", cors_allow_origins=("https://a.example",)).with_cors()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        asks = {"origin": "https://a.example", "access-control-request-method": "POST"}
        preflight = await http.options(CHAT, headers=asks)  # browsers send it without the key
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        asks["origin"] = "https://b.example"
        assert (await http.options(CHAT, headers=asks)).status_code == 400
        refused = await http.post(CHAT, json=HI, headers={"origin": "https://a.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://a.example"
        right = {"origin": "https://a.example", "authorization": "Bearer k"}
        assert (await http.post(CHAT, json=HI, headers=right)).status_code == 200
        wrong = {"origin": "https://b.example", "authorization": "Bearer k"}
        assert (await http.post(CHAT, json=HI, headers=wrong)).status_code == 403


async def test_a_proxys_prefix(make: Any) -> None:
    async with http_client(make(root_path="/llm")) as http:
        for path in ("/llm/v1/models", "/v1/models"):
            assert (await http.get(path)).status_code == 200
        assert (await http.get("/llmv1/models")).status_code == 404


# ---------------------------------------------------------------------- how many
async def test_requests_in_progress_are_bounded(make: Any, client: FakeClient) -> None:
    client.delay = 0.05
    async with http_client(make(max_concurrent=3)) as http:
        tasks = [asyncio.create_task(http.post(CHAT, json={**HI, "max_tokens": 3})) for _ in range(8)]
        answers = [await task for task in tasks]
        assert sorted(answer.status_code for answer in answers) == [200] * 3 + [429] * 5
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.json()["error"]["code"] == "too_many_requests" and "retry-after" in refused.headers
        assert (await http.get("/health")).status_code == 200
        assert (await http.post(CHAT, json=HI)).status_code == 200


# ---------------------------------------------------------------------- the table
def test_the_table_finds_by_path_and_method() -> None:
    async def handler(request: Any) -> Any: ...

    def endpoint(path: str, *methods: str) -> Endpoint:
        return Endpoint(path, methods, handler, Access.USER)

    one, other = endpoint("/a/{id}", "GET"), endpoint("/a/{id}", "DELETE")
    exact, deep = endpoint("/a/b", "POST"), endpoint("/f/{p:path}", "GET")
    table = RouteTable([one, other, exact, deep])
    found = table.find("GET", "/a/x")
    assert found.endpoint is one and found.allowed and found.params == {"id": "x"}
    assert table.find("HEAD", "/a/x").endpoint is one
    assert table.find("DELETE", "/a/x").endpoint is other
    assert table.find("POST", "/a/b").endpoint is exact
    assert table.find("GET", "/a/b").endpoint is one
    assert table.find("GET", "/f/x/y").params == {"p": "x/y"}
    assert not table.find("PUT", "/a/x").allowed and table.find("PUT", "/a/x").endpoint is one
    assert table.find("GET", "/a/x/y").endpoint is None
    assert table.methods("/a/{id}") == ["DELETE", "GET"]
    with pytest.raises(ValueError, match="two routes"):
        RouteTable([one, endpoint("/a/{id}", "POST", "GET")])
