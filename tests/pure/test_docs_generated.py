"""Pages that are made from the code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools import generate
from tools.check.source import Source


@pytest.mark.parametrize(
    ("docstring", "line"),
    [
        ("The pool.", "The pool"),
        ("The pool. It holds pages.\n\nMore.", "The pool"),
        ("The pool of\npages:\n\nmore.", "The pool of pages"),
        ("A tree (Doe et al. 2023, arXiv:1). More.", "A tree (Doe et al. 2023, arXiv:1)"),
    ],
)
def test_first_sentence(docstring: str, line: str) -> None:
    assert generate.first_sentence(docstring) == line


def test_module_map_lists_the_product_only() -> None:
    sources = [
        Source("src/trunkline/cache/pages.py", '"""Pages."""'),
        Source("src/trunkline/types.py", '"""Types."""'),
        Source("tests/test_x.py", '"""A test."""'),
    ]
    text = generate.module_map(sources)
    assert (
        text.index("- `types.py`: Types\n")
        < text.index("## trunkline/cache")
        < text.index("- `pages.py`: Pages\n")
    )
    assert "test_x" not in text


def test_check_finds_a_stale_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs/page.md"
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "pages", lambda: {"page.md": "new\n"})
    monkeypatch.setattr(sys, "argv", ["generate", "--check"])
    page.write_text("old\n")
    assert generate.main() == 1
    assert "docs/page.md: out of date" in capsys.readouterr().out and page.read_text() == "old\n"
    monkeypatch.setattr(sys, "argv", ["generate"])
    assert generate.main() == 0 and page.read_text() == "new\n"
    monkeypatch.setattr(sys, "argv", ["generate", "--check"])
    assert generate.main() == 0
