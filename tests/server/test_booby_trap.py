"""A model folder that wants to harm: it is refused by name, or what would harm is never run (P14)."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.server.test_engine_client import config_of
from trunkline.config.model_spec import ModelError, load_model_spec
from trunkline.engine.client import EngineClient
from trunkline.models.weights import Checkpoint
from trunkline.server.app import load_served_model
from trunkline.types import RequestError


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, fuse: Path) -> None:
        self.fuse = fuse

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.fuse}",)


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def fuse(tmp_path: Path) -> Path:
    """Exists once anything has exploded."""
    return tmp_path / "exploded"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "weights.pkl"])
async def test_pickled_weights_are_named_and_never_read(folder: Path, fuse: Path, name: str) -> None:
    (folder / name).write_bytes(pickle.dumps(Bomb(fuse)))
    client = await EngineClient.in_process(config_of(folder))  # beside real weights it is ignored
    await client.close()
    (folder / "model.safetensors").unlink()
    with pytest.raises(RequestError, match=name) as caught:
        await EngineClient.in_process(config_of(folder))
    assert caught.value.code == "no_weights"
    assert not fuse.exists()


async def test_a_pickle_in_the_weights_clothes(folder: Path, fuse: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(fuse)))
    with pytest.raises(RequestError, match=r"model\.safetensors") as caught:
        await EngineClient.in_process(config_of(folder))
    assert caught.value.code == "bad_checkpoint" and not fuse.exists()


async def test_code_beside_the_configuration_is_never_run(folder: Path, fuse: Path) -> None:
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py"):
        (folder / name).write_text(f"open({str(fuse)!r}, 'w')\n")
    code = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    edit(folder / "config.json", auto_map=code)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.T", None]})
    load_served_model(config_of(folder))
    client = await EngineClient.in_process(config_of(folder))
    await client.close()
    assert not fuse.exists()
    edit(folder / "config.json", architectures=["EvilForCausalLM"], model_type="evil")
    with pytest.raises(ModelError, match="EvilForCausalLM"):
        load_model_spec(str(folder))
    assert not fuse.exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/../../outside.safetensors"])
def test_an_index_reaches_nothing_outside(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match="plain file name") as caught:
        Checkpoint(str(folder))
    assert caught.value.code == "bad_checkpoint"


HOSTILE = {
    "endless": "{% for i in range(10**9) %}{% endfor %}",
    "huge": "{{ 'a' * 10**10 }}",
    "escape": "{{ self.__init__.__globals__ }}",
    "import": "{% include '/etc/passwd' %}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "broken": "{% for %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_costs_its_folder_only(folder: Path, name: str) -> None:
    edit(folder / "tokenizer_config.json", chat_template=HOSTILE[name])
    for file in folder.glob("*.jinja"):
        file.unlink()
    with pytest.raises((RequestError, ModelError)) as caught:
        template = load_served_model(config_of(folder)).template
        assert template is not None
        template.render([{"role": "user", "content": "hi"}])
    assert "chat_template" in caught.value.code
    assert "root:" not in str(caught.value)
