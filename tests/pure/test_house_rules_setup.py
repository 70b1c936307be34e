"""The set-up of the virtual environment: when it has work, and what it says when it can't do it."""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

from tools import setup_env
from tools.check.layers import imported_names
from tools.check.source import read_sources


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that set-up would run."""
    made: list[list[str]] = []
    monkeypatch.setattr(setup_env, "run", made.append)
    return made


def set_up(monkeypatch: pytest.MonkeyPatch, venv: Path, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["setup_env", "--venv", str(venv), *arguments])
    venv.mkdir(exist_ok=True)
    (venv / "pyvenv.cfg").touch()
    monkeypatch.setattr(setup_env, "is_usable", lambda python, folder: True)
    (venv / "bin").mkdir(exist_ok=True)
    (venv / "bin/python").touch()
    setup_env.main()


def test_second_run_does_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calls: list[list[str]]
) -> None:
    set_up(monkeypatch, tmp_path / "venv")
    assert [command[-1] for command in calls] == ["torch==2.13.0", "torch==2.13.0"]
    set_up(monkeypatch, tmp_path / "venv")
    assert len(calls) == 2


def test_extras_add_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calls: list[list[str]]) -> None:
    set_up(monkeypatch, tmp_path / "venv", "--extras", "test")
    set_up(monkeypatch, tmp_path / "venv", "--extras", "check")
    assert calls[-1][-2].endswith("[check,test]")
    set_up(monkeypatch, tmp_path / "venv")
    assert len(calls) == 4, "serving needs nothing more than testing"


@pytest.mark.parametrize("change", [["--torch", "torch==2.12.0"], ["--torch-index", "https://other.example"]])
def test_other_wishes_install_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calls: list[list[str]], change: list[str]
) -> None:
    set_up(monkeypatch, tmp_path / "venv")
    set_up(monkeypatch, tmp_path / "venv", *change)
    assert len(calls) == 4


def test_changed_project_installs_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calls: list[list[str]]
) -> None:
    set_up(monkeypatch, tmp_path / "venv")
    stamp = setup_env.stamp(tmp_path / "venv")
    stamp.write_text(json.dumps({"key": "of an older pyproject.toml", "extras": []}))
    set_up(monkeypatch, tmp_path / "venv")
    assert len(calls) == 4


def test_interrupted_set_up_is_not_taken_for_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(command: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(setup_env, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        set_up(monkeypatch, tmp_path / "venv")
    assert not setup_env.stamp(tmp_path / "venv").exists()


@pytest.mark.parametrize("version", [(3, 10, 0), (3, 14, 0)])
def test_wrong_python_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], version: tuple[int, int, int]
) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    with pytest.raises(SystemExit) as stop:
        setup_env.check_python()
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert f"Python {version[0]}.{version[1]}" in said and "PYTHON=python3.12" in said


def test_missing_venv_module_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup_env.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        setup_env.check_python()
    assert "apt install python3-venv" in capsys.readouterr().err


def test_a_folder_that_is_no_environment_is_left_alone(
    tmp_path: Path, calls: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    precious = tmp_path / "venv" / "precious"
    precious.mkdir(parents=True)
    with pytest.raises(SystemExit):
        setup_env.create(tmp_path / "venv")
    assert precious.exists() and "VENV=another-folder" in capsys.readouterr().err


def test_dependencies_are_those_imported() -> None:
    """No run-time dependency without use, no import without a dependency."""
    project = tomllib.loads((setup_env.ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w-]+", entry)[0].lower() for entry in project["dependencies"]}  # type: ignore[index]
    imported = {
        name.split(".")[0]
        for source in read_sources(setup_env.ROOT)
        if source.folder == "src"
        for node in ast.walk(source.tree)
        for name in imported_names(node, source.module)
    }
    extras = {name: project["optional-dependencies"][name] for name in ("xgrammar", "plot", "otel")}
    optional = {re.match(r"[a-z]+", entry)[0] for entries in extras.values() for entry in entries}  # type: ignore[index]
    assert optional <= imported
    imported -= sys.stdlib_module_names | {"trunkline"} | optional
    used = {"pyzmq" if name == "zmq" else name for name in imported}
    others = {"numpy", "httptools", "python-multipart"}  # used by other libraries
    assert used | others == declared
