"""The guide's examples run as they stand, one after the other, and print what their comments say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tools.check.documents import FENCE

GUIDE = Path(__file__).resolve().parents[2] / "docs/language.md"
PRINT = re.compile(r"^print\(.*\)  # (.+)$", re.MULTILINE)


def test_examples_print_what_they_say(tmp_path: Path) -> None:
    blocks = [text for kind, text in FENCE.findall(GUIDE.read_text()) if kind == "python"]
    assert len(blocks) >= 8
    program = "\n".join(blocks)
    expected = PRINT.findall(program)
    assert len(expected) == program.count("print(") >= 10
    script = tmp_path / "guide.py"
    script.write_text(program)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == expected
