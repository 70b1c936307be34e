"""Write the pages of docs/ that are made from the code; with `--check`, fail if one is out of date."""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.pure.grammar.cases import keyword_table
from tools.check.source import Source, read_sources
from tools.errors import error_catalog
from trunkline.cli import main as program
from trunkline.config.compat import capability_table_markdown

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ("offline", "serving", "overhead", "kernels", "grammar")


def module_map(sources: list[Source]) -> str:
    """One line a module: the first sentence of its docstring."""
    lines = [
        "# Modules",
        "",
        "Made by `make docs` from the first sentence of each module's docstring.",
    ]
    folder = ""
    for source in sorted(sources, key=lambda source: (Path(source.path).parent, source.path)):
        if source.folder != "src":
            continue
        docstring = ast.get_docstring(source.tree)
        if docstring is None:
            continue  # an empty __init__; others are found by the house rules
        path = Path(source.path)
        if path.parent.as_posix() != folder:
            folder = path.parent.as_posix()
            lines += ["", f"## {folder.removeprefix('src/')}", ""]
        lines.append(f"- `{path.name}`: {first_sentence(docstring)}")
    return "\n".join(lines) + "\n"


def first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"\.\s+(?=[A-Z`])", paragraph)[0].rstrip(".:")


def command_reference() -> str:
    """What every command answers to --help."""
    commands = [[command.name] for command in program.COMMANDS if command.name != "version"]
    commands += [["bench", name] for name in BENCHMARKS]
    lines = ["# Commands", "", "Made by `make docs` from the programs' own `--help`.", ""]
    lines += ["```", help_of([]), "```"]
    for words in commands:
        lines += ["", f"## trunkline {' '.join(words)}", "", "```", help_of(words), "```"]
    return "\n".join(lines) + "\n"


def help_of(words: list[str]) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = program.main([*words, "--help"])
    if status != 0:
        raise SystemExit(f"trunkline {' '.join(words)} --help: status {status}")
    return said.getvalue().strip()


def with_section(name: str, section: str, text: str) -> str:
    """A page that is written by hand but for one section, between two comments."""
    begin, end = f"<!-- {section}: made by `make docs` -->\n", f"<!-- end of {section} -->\n"
    page = (ROOT / "docs" / name).read_text()
    before, after = page.split(begin)[0], page.split(end)[1]
    return f"{before}{begin}{text}{end}{after}"


def pages() -> Mapping[str, str]:
    """Path below docs/ and text of each generated page."""
    return {
        "modules.md": module_map(read_sources(ROOT)),
        "capabilities.md": capability_table_markdown(),
        "cli.md": command_reference(),
        "errors.md": error_catalog(read_sources(ROOT)),
        "structured-output.md": with_section("structured-output.md", "keywords", keyword_table()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    args = parser.parse_args()
    stale = []
    for name, text in pages().items():
        path = ROOT / "docs" / name
        if not path.exists() or path.read_text() != text:
            stale.append(f"docs/{name}")
            if not args.check:
                path.write_text(text)
                print(f"wrote docs/{name}")
    if stale and args.check:
        print(f"{', '.join(stale)}: out of date, run `make docs`")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
