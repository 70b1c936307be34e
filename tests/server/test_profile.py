"""Profiles of the engine, over HTTP and from `Engine`; and unknown fields where they are let through."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import http_client, make_app
from tests.server.fake_client import FakeClient
from trunkline.config.schema import EngineConfig, ObserveConfig
from trunkline.engine.offline import Engine
from trunkline.text.tokenizer import Tokenizer
from trunkline.types import RequestError


def test_an_engine_writes_a_chrome_trace(tmp_path: Path) -> None:
    with Engine(profile_folder=str(tmp_path), max_total_tokens=512, device="cpu", cpu_threads=1) as engine:
        path = Path(engine.start_profile(profile_prefix="mine", record_shapes=True))
        with pytest.raises(RequestError) as caught:
            engine.start_profile()
        assert caught.value.code == "profile_refused"
        engine.generate("hi", {"max_new_tokens": 3, "ignore_eos": True})
        assert engine.stop_profile() == str(path)
        events = json.loads(path.read_text())["traceEvents"]
        assert len(events) > 50 and path.name.startswith("mine-")
        with pytest.raises(RequestError):
            engine.stop_profile()
        path = Path(engine.start_profile(num_steps=2, output_dir=str(tmp_path / "below")))
        engine.generate("hi", {"max_new_tokens": 6, "ignore_eos": True})
        assert path.exists() and path.parent == tmp_path / "below"
        with pytest.raises(RequestError) as caught:
            engine.start_profile(output_dir=str(tmp_path.parent))
        assert (caught.value.code, caught.value.param) == ("folder_not_allowed", "output_dir")
        with pytest.raises(RequestError) as caught:
            engine.start_profile(activities=["GPU"])
        assert caught.value.code == "profile_refused"


async def test_profiles_over_http(http: httpx.AsyncClient) -> None:
    started = await http.post("/start_profile", json={"num_steps": 3, "activities": ["CPU"]})
    assert started.status_code == 200 and started.json()["path"].endswith(".trace.json")
    assert (await http.post("/stop_profile")).status_code == 200
    assert (await http.post("/stop_profile", json={})).status_code == 200
    for fields, code in (
        ({"profile_by_stage": True}, "unsupported_field"),
        ({"activities": ["MEM"]}, "invalid_value"),
        ({"output_dir": "/"}, "folder_not_allowed"),
        ({"profile_prefix": "../x"}, "invalid_value"),
    ):
        refused = await http.post("/start_profile", json=fields)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, code)


async def test_unknown_fields_can_be_let_through_but_not_silently(
    client: FakeClient, tokenizer: Tokenizer, config: EngineConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    body = {
        "text": "hi", "temprature": 1, "sampling_params": {"max_new_tokens": 2, "topp": 1}, "stream": False,
    }  # fmt: skip
    for lenient in (False, True):
        app = make_app(client, tokenizer, config, observe=ObserveConfig(allow_unknown_fields=lenient))
        async with http_client(app) as http:
            answer = await http.post("/generate", json=body)
            known = await http.post("/generate", json={"text": "hi"})
        assert answer.status_code == (200 if lenient else 400)
        assert "x-ignored-fields" not in known.headers
    assert answer.headers["x-ignored-fields"] == "temprature, sampling_params.topp"
    assert "sampling_params.topp" in caplog.text
