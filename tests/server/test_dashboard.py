"""The Grafana dashboard asks only for metrics that exist, and none of these is empty under traffic (P20)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import http_client, make_app
from tests.server.fake_client import FakeClient
from tools.setup_env import ROOT
from trunkline.config.schema import EngineConfig
from trunkline.text.tokenizer import Tokenizer

DASHBOARD = ROOT / "src" / "trunkline" / "assets" / "grafana.json"


def queries(path: Path) -> Iterator[str]:
    dashboard = json.loads(path.read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for variable in dashboard["templating"]["list"]:
        yield variable["query"]


async def traffic(http: httpx.AsyncClient) -> str:
    """Requests of every kind; the exposition afterwards."""
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
    assert (await http.post("/v1/chat/completions", json=chat)).status_code == 200
    schema = {"response_format": {"type": "json_object"}}
    assert (await http.post("/v1/chat/completions", json={**chat, **schema})).status_code == 200
    assert (await http.post("/generate", json={"text": ["a", "b"]})).status_code == 200
    return (await http.get("/metrics")).text


async def test_the_dashboards_metrics_exist(http: httpx.AsyncClient) -> None:
    text = await traffic(http)
    exported = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    asked = {name for query in queries(DASHBOARD) for name in re.findall(r"trunkline:\w+", query)}
    assert len(asked) > 25
    assert asked <= exported, asked - exported


async def test_no_exported_metric_stays_empty(http: httpx.AsyncClient, client: FakeClient) -> None:
    """What stays zero here must be something that did not happen."""
    client.cached, client.forced = 1, [0]
    text = await traffic(http)
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith(("_created", "_bucket", "_sum")):
                sums[sample.name] = sums.get(sample.name, 0) + sample.value
    nothing = {name for name, value in sums.items() if value == 0}
    did_not_happen = {
        "num_running_reqs",
        "num_queue_reqs",
        "num_grammar_queue_reqs",
        "num_aborted_requests_total",
    }
    assert nothing == {f"trunkline:{name}" for name in did_not_happen}


@pytest.mark.parametrize("aliases", ["none", "sglang"])
async def test_aliases(client: FakeClient, tokenizer: Tokenizer, config: EngineConfig, aliases: str) -> None:
    from trunkline.config.schema import ObserveConfig

    metrics_of = ObserveConfig(metrics_aliases=aliases)  # type: ignore[arg-type]
    app = make_app(client, tokenizer, config, observe=metrics_of)
    async with http_client(app) as http:
        text = await traffic(http)
    assert ("sglang:time_to_first_token_seconds_bucket" in text) is (aliases == "sglang")
    own = [line for line in text.splitlines() if line.startswith("trunkline:")]
    other = [line for line in text.splitlines() if line.startswith("sglang:")]
    assert aliases == "none" or len(own) == len(other)
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert "trunkline:token_usage" in families


async def test_buckets_are_those_asked_for(
    client: FakeClient, tokenizer: Tokenizer, config: EngineConfig
) -> None:
    from trunkline.config.schema import ObserveConfig

    app = make_app(client, tokenizer, config, observe=ObserveConfig(first_token_buckets=(0.25, 7.5)))
    async with http_client(app) as http:
        text = await traffic(http)
    bounds = re.findall(r'trunkline:time_to_first_token_seconds_bucket\{le="([^"]+)"', text)
    assert bounds == ["0.25", "7.5", "+Inf"]
