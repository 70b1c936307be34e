"""Make the virtual environment that the Makefile's targets run in; does nothing when it is up to date.

Standard library only, and any Python >= 3.8 can start it, so that a wrong Python gets a clear message.
Up to date means that the stamp in the environment was written for the same pyproject.toml, native sources,
list of packages, torch, Python and path.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 11), (3, 13)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--torch", default="torch==2.13.0", help="requirement of torch to install")
    parser.add_argument("--torch-index", default="", help="extra package index for torch; empty: none")
    parser.add_argument("--extras", default="", help="comma-separated extras of the package")
    args = parser.parse_args()
    venv = args.venv.resolve()
    wanted = {name for name in args.extras.split(",") if name}
    key = environment_key(venv, args.torch, args.torch_index)
    installed = read_stamp(venv, key)
    if installed is not None and wanted <= installed:
        return
    check_python()
    create(venv)
    extras = wanted | (installed or set())
    install(venv, extras, args.torch, args.torch_index)
    stamp(venv).write_text(json.dumps({"key": key, "extras": sorted(extras)}))


def stamp(venv: Path) -> Path:
    return venv / "trunkline-stamp.json"


def environment_key(venv: Path, torch: str, torch_index: str) -> str:
    """Digest of everything that decides what the environment holds."""
    parts = [(ROOT / "pyproject.toml").read_text(), torch, torch_index, str(venv), str(sys.version_info[:2])]
    native = sorted((ROOT / "csrc").rglob("*.*"))
    parts += [path.read_text() for path in (ROOT / "CMakeLists.txt", *native)]
    # An editable install finds the packages that were there when it was made.
    parts += sorted(str(path.parent) for path in (ROOT / "src").rglob("__init__.py"))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def read_stamp(venv: Path, key: str) -> set[str] | None:
    """The extras that are installed, or None when the environment is absent, unfinished or out of date."""
    try:
        found = json.loads(stamp(venv).read_text())
    except (OSError, ValueError):
        return None
    return set(found["extras"]) if found.get("key") == key else None


def check_python() -> None:
    version = sys.version_info[:2]
    if not OLDEST <= version <= NEWEST:
        fail(
            f"Python {version[0]}.{version[1]} at {sys.executable} is not supported: "
            "install Python 3.11, 3.12 or 3.13 and name it, e.g. `make serve PYTHON=python3.12`."
        )
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        fail(
            f"the venv module of {sys.executable} is missing: "
            f"install it (Debian, Ubuntu: `sudo apt install python3-venv`) and run make again."
        )


def create(venv: Path) -> None:
    """Make the environment, anew if its Python is gone, of another version, or it was moved here."""
    python = venv / "bin" / "python"
    if python.exists() and is_usable(python, venv):
        return
    if venv.exists() and not (venv / "pyvenv.cfg").exists() and any(venv.iterdir()):
        fail(f"{venv} exists and is no virtual environment: move it away, or pass VENV=another-folder.")
    shutil.rmtree(venv, ignore_errors=True)
    print(f"Making a virtual environment in {venv}", flush=True)
    run([sys.executable, "-m", "venv", str(venv)])


def is_usable(python: Path, venv: Path) -> bool:
    """Whether the environment's interpreter starts, has our version, and its scripts point at this place."""
    probe = "import sys; print(sys.prefix, *sys.version_info[:2])"
    result = subprocess.run([str(python), "-c", probe], capture_output=True, text=True)
    if result.stdout.split() != [str(venv), *map(str, sys.version_info[:2])]:
        return False
    pip = venv / "bin" / "pip"
    return pip.exists() and pip.read_text().startswith(f"#!{venv}/")


def install(venv: Path, extras: set[str], torch: str, torch_index: str) -> None:
    """torch first, by itself: only there may the CPU build's own index be asked."""
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    index = ["--extra-index-url", torch_index, "--retries", "1"] if torch_index else []
    print(f"Installing {torch} (about 200 MB, once)", flush=True)
    run([*pip, *index, torch])
    package = f"{ROOT}[{','.join(sorted(extras))}]" if extras else str(ROOT)
    print(f"Installing trunkline{' with ' + ', '.join(sorted(extras)) if extras else ''}", flush=True)
    run([*pip, "--editable", package, torch])


def run(command: list[str]) -> None:
    result = subprocess.run(command)
    if result.returncode != 0:
        fail(
            f"this command failed with status {result.returncode}:\n  {' '.join(command)}\n"
            "Its output is above. Without network access, name a mirror in PIP_INDEX_URL or PIP_FIND_LINKS."
        )


def fail(message: str) -> NoReturn:
    print(f"setup: {message}", file=sys.stderr)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
