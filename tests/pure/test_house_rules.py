"""Each house rule finds a planted violation and leaves a clean sample alone; and the tree keeps them all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.check import layers, safety, shape
from tools.check.__main__ import RULES, line_report, main
from tools.check.documents import check_document, known_flags
from tools.check.source import Source, read_sources

ROOT = Path(__file__).resolve().parents[2]
CACHE = "src/trunkline/cache/radix.py"
WORKER = "src/trunkline/worker/rows.py"
CLI = "src/trunkline/cli/chat.py"

# rule, path, code that breaks it, code that does not
SAMPLES = [
    ("layers", CACHE, "from trunkline.engine.core import EngineCore", "from trunkline.types import CacheKey"),
    ("layers", CACHE, "def f():\n    import trunkline.server.app", "import trunkline.cache.pages"),
    ("layers", CACHE, "from ..engine import core", "from . import pages"),
    ("layers", CACHE, "from trunkline.surprise import x", "import surprise"),
    ("layers", CACHE, "from trunkline import server", "from trunkline import __version__"),
    ("layers", WORKER, "from trunkline.scheduler.request import Request", "import trunkline.scheduler.plan"),
    (
        "layers",
        "src/trunkline/scheduler/policy.py",
        "from trunkline.worker.rows import Rows",
        "from trunkline.scheduler.plan import StepPlan",
    ),
    ("layers", WORKER, "from trunkline.text import x", "from trunkline.scheduler.plan import StepPlan"),
    ("layers", "src/trunkline/text/stop.py", "from trunkline.engine import client", "import trunkline.types"),
    ("torch-free", CACHE, "import torch", "import torchless"),
    ("torch-free", CACHE, "def f():\n    from torch import nn", "import numpy"),
    ("torch-free", CACHE, "from safetensors.torch import load_file", "import safetensors"),
    ("torch-free", CLI, "import torch", "def f():\n    import torch"),
    (
        "torch-free",
        CLI,
        "try:\n    import torch\nexcept ImportError:\n    pass",
        "def f():\n    import torch",
    ),
    (
        "torch-free",
        "src/trunkline/engine/process.py",
        "from trunkline.worker.runner import ModelWorker",
        "if TYPE_CHECKING:\n    from trunkline.worker.runner import ModelWorker",
    ),
    ("test-library", WORKER, "import transformers", "import tokenizers"),
    ("test-library", "training/x.py", "from transformers import AutoModel", "import torch"),
    ("file-size", CACHE, "x = 1\n" * 800, "x = 1\n" * 799),
    ("function-size", CACHE, "def f():\n" + "    x = 1\n" * 79, "def f():\n" + "    x = 1\n" * 78),
    ("function-size", CACHE, "async def f():\n" + "    x = 1\n" * 79, "class A:\n" + "    x = 1\n" * 300),
    ("docstring", CACHE, "x = 1", '"""Pages."""'),
    ("docstring", CACHE, "# Pages.\nx = 1", ""),
    ("vague-name", "src/trunkline/cache/utils.py", "", "'''fine'''"),
    ("vague-name", "tests/model_helpers.py", "", ""),
    ("vague-name", CACHE, "class PageManager: pass", "class Managers: pass"),
    ("vague-name", CACHE, "class SchedulerV2: pass", "class Scheduler: pass"),
    ("mixin", CACHE, "class LogMixin: pass", "class Log: pass"),
    ("mixin", CACHE, "class A(B, C): pass", "class A(B, Protocol): pass"),
    ("mixin", CACHE, "class A(nn.Module, Cache[int]): pass", "class A(KeyError, ModelError): pass"),
    ("state", CACHE, "seen = {}", "seen = MappingProxyType({})"),
    ("state", CACHE, "seen: list[int] = []", "__all__ = []"),
    ("state", CACHE, "seen: dict[str, int] = {}", "seen: Mapping[str, int] = {}"),
    ("state", CACHE, "if True:\n    seen = collections.defaultdict(list)", "def f():\n    seen = []"),
    ("state", CACHE, "seen = {x for x in range(3)}", "seen = tuple(x for x in range(3))"),
    ("state", "tests/test_x.py", "def f():\n    global x\n    x = 1", "TABLE = [1, 2]"),
    ("field-count", CACHE, "class ForwardBatch:\n" + "    x: int\n" * 12, "class B:\n" + "    x: int\n" * 12),
    (
        "field-count",
        CACHE,
        "class AConfig:\n"
        + "    x: int\n" * (shape.MAX_CONFIG_FIELDS // 2 + 1)
        + "class EngineConfig:\n    a: AConfig\n    b: AConfig\n",
        "class AConfig:\n"
        + "    x: int\n" * (shape.MAX_CONFIG_FIELDS // 2)
        + "class EngineConfig:\n    a: AConfig\n    b: AConfig\n",
    ),
    ("banned", CACHE, "import pickle", "import json"),
    ("banned", CACHE, "def f():\n    from dill import loads", "def f():\n    from json import loads"),
    ("banned", CACHE, "import marshal as m", "import marshmallow"),
    ("banned", WORKER, "w = torch.load(path)", "model.load(path)"),
    ("banned", WORKER, "eval(text)", "model.eval()"),
    ("banned", "training/x.py", "exec(text)", "executor(text)"),
    ("banned", "tools/x.py", "os.system('ls')", "subprocess.run(['ls'])"),
    ("banned", "tools/x.py", "subprocess.run('ls', shell=True)", "subprocess.run(['ls'], shell=False)"),
    ("banned", CACHE, "numpy.load(path, allow_pickle=True)", "numpy.load(path)"),
    ("banned", CACHE, "yaml.load(text)", "yaml.safe_load(text)"),
    ("banned", CACHE, "socket.recv_pyobj()", "socket.recv()"),
    ("banned", CACHE, "q = multiprocessing.Queue()", "q = queue.Queue()"),
    ("environment", CACHE, "import os\nx = os.environ['A']", "import os\nx = os.getpid()"),
    ("environment", CACHE, "from os import environ", "from os import path"),
    ("environment", "src/trunkline/server/app.py", "print(sys.argv)", "print(sys.path)"),
    (
        "silent-except",
        CACHE,
        "try:\n    f()\nexcept Exception:\n    pass",
        "try:\n    f()\nexcept KeyError:\n    pass",
    ),
    (
        "silent-except",
        CACHE,
        "try:\n    f()\nexcept:\n    ...",
        "try:\n    f()\nexcept Exception:\n    log()",
    ),
    ("silent-except", CACHE, "with suppress(Exception):\n    f()", "with suppress(OSError):\n    f()"),
    ("unfinished", CACHE, "x = 1  # TODO: more", "x = 1  # to do it is to learn it"),
    ("unfinished", CACHE, "def f():\n    raise NotImplementedError", "def f():\n    raise ValueError"),
]


def broken_rules(path: str, code: str) -> set[str]:
    source = Source(path, code)
    return {violation.rule for rule in RULES for violation in rule(source)}


@pytest.mark.parametrize(
    ("rule", "path", "planted", "clean"), SAMPLES, ids=[f"{i}-{s[0]}" for i, s in enumerate(SAMPLES)]
)
def test_rule(rule: str, path: str, planted: str, clean: str) -> None:
    assert rule in broken_rules(path, planted)
    clean_path = "src/trunkline/cache/page_pool.py" if rule == "vague-name" else path
    ignored = set() if rule == "docstring" else {"docstring"}
    assert broken_rules(clean_path, clean) <= ignored


def test_every_rule_has_a_sample() -> None:
    rules = {name for module in (layers, shape, safety) for name in vars(module) if name.startswith("check_")}
    assert {rule.__name__ for rule in RULES} == rules - {"check_local_paths"}
    by_function = {
        rule.__name__
        for rule in RULES
        if any(list(rule(Source(path, planted))) for _, path, planted, _ in SAMPLES)
    }
    assert by_function == {rule.__name__ for rule in RULES}


@pytest.mark.parametrize("folder", ["home", "root", "tmp", "Users"])
def test_local_path(folder: str) -> None:
    planted = "see " + f"/{folder}/" + "me/x"
    assert [v.rule for v in safety.check_local_paths("README.md", planted)] == ["local-path"]
    for clean in (f"https://host/{folder}/me", f"~/{folder}/x", f"src/{folder}/x", f"/v1/{folder}"):
        assert not list(safety.check_local_paths("README.md", clean)), clean


@pytest.mark.parametrize(
    ("planted", "clean"),
    [
        ("[x](docs/none.md)", "[x](docs/page.md)"),
        ("[x](docs/page.md#none)", "[x](docs/page.md#a-heading)"),
        ("[x](#none)", "# Here\n[x](#here)"),
        ("run `make nothing`", "run `make serve`, which can make a difference"),
        ("see `src/none.py`", "see `src/code.py` and `none.py`"),
        ("see `src/code.py::none`", "see `src/code.py::some`"),
        (
            "```bash\ntrunkline serve --none\n```",
            "```bash\ntrunkline serve --port 1 --page-size 2\ncurl --none\n```",
        ),
    ],
)
def test_document(tmp_path: Path, planted: str, clean: str) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "src").mkdir()
    (tmp_path / "docs/page.md").write_text("# A heading\n")
    (tmp_path / "src/code.py").write_text(
        "PORT = '--port'\nclass A:\n    page_size: int = flag('int')\n\ndef some(): pass\n"
    )
    (tmp_path / "Makefile").write_text("serve:\n")
    (tmp_path / "README.md").write_text(planted)
    flags = known_flags(read_sources(tmp_path))
    assert [v.rule for v in check_document(tmp_path, "README.md", planted, flags)] == ["document"]
    assert not list(check_document(tmp_path, "README.md", clean, flags))


def test_program_fails_on_a_planted_violation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "src/trunkline/cache"
    package.mkdir(parents=True)
    (tmp_path / "Makefile").write_text("")
    monkeypatch.setattr(sys, "argv", ["check", "--root", str(tmp_path)])
    (package / "pages.py").write_text("'''Pages.'''\nimport json\n")
    assert main() == 0
    (package / "pages.py").write_text("import pickle  # no docstring\n")
    assert main() == 1
    assert "src/trunkline/cache/pages.py:1: banned: import of pickle" in capsys.readouterr().out
    (package / "pages.py").write_text("def f(:\n")
    assert main() == 1
    assert "src/trunkline/cache/pages.py:1: syntax: " in capsys.readouterr().out


def test_line_report_counts_every_line() -> None:
    sources = [
        Source("src/a/b/c.py", "x = 1\n" * 3),
        Source("src/a/d.py", "x = 1\n"),
        Source("tests/t.py", "y\n"),
    ]
    report = line_report(sources).split("\n")
    assert [line.split(maxsplit=1) for line in report] == [
        ["1", "src/a"],
        ["3", "src/a/b"],
        ["1", "tests"],
        ["4", "total of src"],
        ["1", "total of tests"],
    ]


def test_struct_limits_are_applied_to_the_real_structs() -> None:
    """The field-count rule goes by class name: it must not lose its subjects by a renaming."""
    defined = {
        name
        for source in read_sources(ROOT)
        if source.folder == "src"
        for name in ("ForwardBatch", "EngineConfig")
        if f"class {name}" in source.text
    }
    assert defined == {"ForwardBatch", "EngineConfig"}


@pytest.mark.parametrize(
    "module", ["trunkline", "trunkline.server.app", "trunkline.cli.main", "trunkline.engine.client"]
)
def test_import_does_not_load_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("planted", "clean"),
    [
        ("def f(x):\n    return x\n", "def f(x: int) -> int:\n    return x\n"),
        ("def f() -> int:\n    return 'text'\n", "def f() -> str:\n    return 'text'\n"),
        ("x: list = [1]\n", "x: list[int] = [1]\n"),
    ],
)
def test_types_are_strict(tmp_path: Path, planted: str, clean: str) -> None:
    (tmp_path / "planted.py").write_text(planted)
    (tmp_path / "clean.py").write_text(clean)
    mypy = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    cache = ["--cache-dir", str(ROOT / ".mypy_cache")]
    result = subprocess.run([*mypy, *cache, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "planted.py" in result.stdout and "clean.py" not in result.stdout


@pytest.mark.parametrize(
    ("rule", "planted"),
    [
        ("F401", "import os\n"),
        ("E501", f"x = {'1' * 120}\n"),
        ("I001", "import sys\nimport os\n\nprint(os, sys)\n"),
        ("B006", "def f(x: list[int] = []) -> None: ...\n"),
        ("C901", "def f(x: int) -> None:\n" + "    if x:\n        print()\n" * 16),
    ],
)
def test_lint_finds(rule: str, planted: str) -> None:
    lint = [sys.executable, "-m", "ruff", "check", "--output-format", "concise", "--no-cache"]
    name = ["--stdin-filename", str(ROOT / "src/trunkline/planted.py"), "-"]
    result = subprocess.run([*lint, *name], input=planted, capture_output=True, text=True)
    assert result.returncode == 1 and rule in result.stdout
