"""Every field of every route x {unknown, unsupported, out of range, wrong type}, from the table of routes,
and its OpenAPI document (P1, P2)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import msgspec
import pytest

from tests.fuzz.runner import LEFT_OUT, ServerError, application, fuzz
from tests.server.conftest import byte_level_tokenizer, make_app
from tests.server.fake_client import FakeClient
from trunkline.config.schema import EngineConfig, ModelConfig, ServerConfig
from trunkline.engine.fields import Rule, Unsupported
from trunkline.engine.native import PerPrompt
from trunkline.server.endpoint import Endpoint
from trunkline.server.gate import Gate
from trunkline.text.tokenizer import Tokenizer

CANDIDATES: list[Any] = [True, 7, 1.5, "abc", [], {}, [[True]], {"nope": 1}, [None], [{"nope": 1}]]


def an_app() -> Gate:
    tokenizer = Tokenizer(byte_level_tokenizer(), {"eos_token": "<|im_end|>"})
    client = FakeClient(lambda request: [70, 71, 72], eos=2, vocab_size=tokenizer.num_tokens)
    config = EngineConfig(model=ModelConfig(path=str(Path("/models/tiny")), served_model_name="tiny"))
    return make_app(client, tokenizer, config)


@pytest.fixture
def config(tmp_path: Path, config: EngineConfig) -> EngineConfig:
    """With storage, so that routes of files and batches read their fields."""
    server = ServerConfig(file_storage_path=str(tmp_path / "files.db"))
    return msgspec.structs.replace(config, server=server)


ENDPOINTS = [one for one in an_app().table.endpoints if one.fields is not None]
FIELDS = [(one, name, rule) for one in ENDPOINTS for name, rule in (one.fields or {}).items()]
IDS = [f"{one.path} {name}" for one, name, _ in FIELDS]


def numbers_in(schema: dict[str, Any]) -> Iterator[Any]:
    """Numbers just outside of the bounds that a schema names."""
    for part in (schema, *schema.get("anyOf", ())):
        step = 1 if part.get("type") == "integer" else 0.001
        if "minimum" in part:
            yield part["minimum"] - step
        if "exclusiveMinimum" in part:
            yield part["exclusiveMinimum"]
        if "maximum" in part:
            yield part["maximum"] + step


def bad_values(rule: Rule) -> list[Any]:
    """What the schema of a rule excludes, among a few values of each type and those outside of its bounds."""
    schema = rule.schema()
    values = [*CANDIDATES, *numbers_in(schema)]
    longest = schema.get("maxLength", 1 << 20)
    if longest < 10_000:
        values.append("x" * (longest + 1))
    validator = jsonschema.Draft202012Validator(schema)
    return [value for value in values if not validator.is_valid(value)]


@pytest.mark.parametrize(("endpoint", "name", "rule"), FIELDS, ids=IDS)
async def test_what_the_schema_excludes_is_refused_by_name(
    http: httpx.AsyncClient, endpoint: Endpoint, name: str, rule: Rule
) -> None:
    others = {"text": "hi"} if isinstance(rule, PerPrompt) else {}  # it is read when the prompts are known
    for value in bad_values(rule):
        response = await http.request(endpoint.methods[0], endpoint.path, json={**others, name: value})
        assert response.status_code == 400, (value, response.text)
        error = response.json()["error"]
        if isinstance(error, str):  # Ollama's have nothing but a text
            assert name in error
            continue
        assert (error["param"] or "").split(".")[0].split("[")[0] == name, (value, error)
        if isinstance(rule, Unsupported):
            assert error["code"] == "unsupported_field", value


def test_most_fields_have_values_that_are_refused() -> None:
    """The test above must not pass by having nothing to ask."""
    without = {name for _, name, rule in FIELDS if not bad_values(rule)}
    assert len(without) < 0.1 * len({name for _, name, _ in FIELDS}), without


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda one: one.path)
async def test_unknown_fields_are_refused_by_name(http: httpx.AsyncClient, endpoint: Endpoint) -> None:
    for method in endpoint.methods:
        response = await http.request(method, endpoint.path, json={"temprature": 1})
        assert response.status_code == 400
        error = response.json()["error"]
        if isinstance(error, str):
            assert "'temprature' is no field of this request" in error
        else:
            assert (error["code"], error["param"]) == ("unknown_field", "temprature")


async def test_the_document_describes_every_route(http: httpx.AsyncClient, app: Gate) -> None:
    document = (await http.get("/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    for endpoint in app.table.endpoints:
        for method in endpoint.methods:
            assert (method, endpoint.path.replace(":path", "")) in described
    chat = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    jsonschema.Draft202012Validator.check_schema(chat["schema"])
    good = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0.5, "logit_bias": {"5": 1}}
    jsonschema.validate(good, chat["schema"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**good, "temperature": -1}, chat["schema"])


def test_random_calls_meet_no_server_error() -> None:
    loop = asyncio.new_event_loop()
    try:
        send = application(an_app(), loop)
        seen = fuzz(send(method="GET", url="/openapi.json").json(), send, calls=400, seed=1)
    finally:
        loop.close()
    assert seen[200] > 40 and seen[400] > 40 and max(seen) < 500


def test_the_fuzzer_notices_a_server_error() -> None:
    document = {
        "openapi": "3.1.0", "info": {"title": "t", "version": "1"},
        "paths": {"/x": {"get": {"responses": {"200": {"description": "d"}}}}},
    }  # fmt: skip
    with pytest.raises(ServerError):
        fuzz(document, lambda **request: httpx.Response(500), calls=1, seed=0)
    assert "/x" not in LEFT_OUT
