"""From the constraining fields of each route to what the core is asked, and back (P2, P5)."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.server.conftest import events_of, http_client, make_app
from tests.server.fake_client import FakeClient
from trunkline.config.schema import EngineConfig
from trunkline.text.tokenizer import Tokenizer
from trunkline.types import FinishReason, GrammarSpec, Thinking

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
HI = {"messages": [{"role": "user", "content": "hi"}]}
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"const": "ü"}}}
SCHEMA_TEXT = '{"type":"object","properties":{"b":{"type":"integer"},"a":{"const":"ü"}}}'
ORDERED = GrammarSpec("json_schema", SCHEMA_TEXT, ordered=True)
TAG = {"type": "structural_tag", "format": {"type": "const_string", "value": "x"}}
FORMATS: list[tuple[str, dict[str, Any], GrammarSpec | None]] = [
    (CHAT, {"response_format": {"type": "text"}}, None),
    (CHAT, {"response_format": {"type": "json_object"}}, GrammarSpec("json_object")),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        ORDERED,
    ),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": False}}},
        GrammarSpec("json_schema", SCHEMA_TEXT),
    ),
    (CHAT, {"response_format": TAG}, GrammarSpec("structural_tag", json.dumps(TAG, separators=(",", ":")))),
    (CHAT, {"regex": "a+"}, GrammarSpec("regex", "a+")),
    (CHAT, {"ebnf": 'root ::= "a"', "regex": ""}, GrammarSpec("ebnf", 'root ::= "a"')),
    (COMPLETIONS, {"json_schema": SCHEMA}, ORDERED),
    (COMPLETIONS, {"response_format": {"type": "json_object"}}, GrammarSpec("json_object")),
    (GENERATE, {"sampling_params": {"json_schema": SCHEMA_TEXT}}, ORDERED),
    (GENERATE, {"sampling_params": {"json_schema": SCHEMA}}, ORDERED),
    (GENERATE, {"sampling_params": {"regex": "", "ebnf": ""}}, None),
    (
        GENERATE,
        {"sampling_params": {"structural_tag": json.dumps(TAG)}},
        GrammarSpec("structural_tag", json.dumps(TAG)),
    ),
]  # fmt: skip


def body_of(route: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {**{CHAT: HI, COMPLETIONS: {"prompt": "hi"}, GENERATE: {"text": "hi"}}[route], **fields}


@pytest.mark.parametrize(("route", "fields", "spec"), FORMATS)
async def test_the_core_is_asked_for_the_grammar(
    http: httpx.AsyncClient, client: FakeClient, route: str, fields: dict[str, Any], spec: GrammarSpec | None
) -> None:
    response = await http.post(route, json={**body_of(route, fields)})
    assert response.status_code == 200, response.text
    assert [add.grammar for add in client.added] == [spec]


async def test_each_completion_and_each_prompt_has_its_own(
    http: httpx.AsyncClient, client: FakeClient
) -> None:
    await http.post(CHAT, json={**HI, "n": 3, "regex": "a"})
    assert [add.grammar for add in client.added] == [GrammarSpec("regex", "a")] * 3
    client.added.clear()
    params = [{"regex": "a"}, {}, {"ebnf": "b"}]
    await http.post(GENERATE, json={"text": ["x", "y", "z"], "sampling_params": params})
    assert [add.grammar for add in client.added] == [
        GrammarSpec("regex", "a"),
        None,
        GrammarSpec("ebnf", "b"),
    ]


REFUSED = [
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
     "response_format.json_schema.schema"),
    (CHAT, {"response_format": TAG}, "response_format"),
    (COMPLETIONS, {"json_schema": SCHEMA}, "json_schema"),
    (GENERATE, {"sampling_params": {"json_schema": SCHEMA}}, "sampling_params.json_schema"),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("route", "fields", "param"), REFUSED)
async def test_a_refusal_names_field_and_place(
    http: httpx.AsyncClient, client: FakeClient, route: str, fields: dict[str, Any], param: str, stream: bool
) -> None:
    client.refusal = FinishReason(
        "abort", message="no: not", code="unsupported_grammar", status=400, pointer="/properties/a/not"
    )
    response = await http.post(route, json={**body_of(route, fields), "stream": stream})
    assert response.status_code == 400
    assert response.json()["error"] == {
        "message": "no: not",
        "type": "invalid_request_error",
        "param": param,
        "code": "unsupported_grammar",
        "pointer": "/properties/a/not",
    }


async def test_forced_tokens_are_counted(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.tokens_per_message, client.forced = 3, [0, 2]
    answer = (await http.post(GENERATE, json={"text": "hi", "sampling_params": {"regex": "a"}})).json()
    total = answer["meta_info"]["completion_tokens"]
    forced = 2 * (total // 3) + min(total % 3, 1)
    assert answer["meta_info"]["forced_tokens"] == forced > 4
    answer = (await http.post(CHAT, json={**HI, "regex": "a"})).json()
    assert answer["usage"]["completion_tokens_details"]["forced_tokens"] == forced
    exposed = (await http.get("/metrics")).text
    assert f'trunkline:forced_tokens_total{{model_name="tiny"}} {2.0 * forced}' in exposed
    events = events_of(
        (
            await http.post(GENERATE, json={"text": "hi", "sampling_params": {"regex": "a"}, "stream": True})
        ).text
    )
    assert events[-1]["meta_info"]["forced_tokens"] == forced
    assert "forced_tokens" not in (await http.post(GENERATE, json={"text": "hi"})).json()["meta_info"]


async def test_tokens_behind_a_stop_string_are_not_counted_as_forced(
    http: httpx.AsyncClient, client: FakeClient
) -> None:
    client.tokens_per_message, client.forced = 40, list(range(40))
    params = {"regex": "a", "stop": "llo"}
    answer = (await http.post(GENERATE, json={"text": "hi", "sampling_params": params})).json()["meta_info"]
    assert answer["forced_tokens"] == answer["completion_tokens"] < 5


THINKS: list[tuple[str, dict[str, Any], int | None, bool]] = [  # template, its variables, bound; reasons?
    ("plain", {}, None, False),
    ("switch", {}, None, False),
    ("switch", {"enable_thinking": False}, None, False),
    ("switch", {"enable_thinking": True}, 5, True),
    ("empty", {}, 7, True),
    ("empty", {"enable_thinking": True}, None, True),
    ("empty", {"enable_thinking": False}, None, False),
    ("always", {}, 0, True),
]
TEMPLATES = {
    "plain": "{{ messages[0].content }}",
    "switch": "{{ messages[0].content }}{% if enable_thinking %}<think>\n{% endif %}",
    "empty": "{{ messages[0].content }}{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
    "always": "{{ messages[0].content }}<think>\n",
}


@pytest.mark.parametrize(("template", "kwargs", "most", "reasons"), THINKS)
async def test_reasoning_comes_before_the_grammar(
    client: FakeClient,
    tokenizer: Tokenizer,
    config: EngineConfig,
    template: str,
    kwargs: dict[str, Any],
    most: int | None,
    reasons: bool,
) -> None:
    (end,) = tokenizer.encode("</think>")
    async with http_client(make_app(client, tokenizer, config, TEMPLATES[template])) as http:
        body = {**HI, "regex": "a", "chat_template_kwargs": kwargs}
        body |= {} if most is None else {"max_thinking_tokens": most}
        assert (await http.post(CHAT, json=body)).status_code == 200
    assert client.added[0].thinking == (Thinking((end,), most) if reasons else None)


async def test_reasoning_on_the_native_route(
    http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer
) -> None:
    (end,) = tokenizer.encode("</think>")
    body = {"text": "hi", "require_reasoning": True, "max_thinking_tokens": 3}
    assert (await http.post(GENERATE, json=body)).status_code == 200
    assert (client.added[0].thinking, client.added[0].grammar) == (Thinking((end,), 3), None)
