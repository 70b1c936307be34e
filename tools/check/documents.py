"""Documents tell the truth: what they name exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tools.check.source import Source, Violation, dotted_name

LINK = re.compile(r"\]\((?!https?://|mailto:)([^)#\s]*)(#[^)\s]*)?\)")
MAKE_TARGET = re.compile(r"(?:`|^|\s)make ([a-z][a-z-]+)(?=`|\s*$| [A-Z]+=)", re.MULTILINE)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
CODE_PATH = re.compile(r"`((?:src|tests|tools|docs|training|benchmarks|\.ci)/[\w./-]+)(?:::(\w+))?`")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OUR_COMMANDS = re.compile(r"trunkline|python -m |make ")


def read_documents(root: Path) -> list[tuple[str, str]]:
    """Path and text of every Markdown page of the repository."""
    folders = ("docs", "training", "benchmarks")
    pages = [*root.glob("*.md"), *(page for name in folders for page in (root / name).rglob("*.md"))]
    return [(page.relative_to(root).as_posix(), page.read_text()) for page in sorted(pages)]


def check_document(root: Path, path: str, text: str, flags: frozenset[str]) -> Iterator[Violation]:
    yield from check_links(root, path, text)
    yield from check_named_things(root, path, text)
    yield from check_flags(path, text, flags)


def check_links(root: Path, path: str, text: str) -> Iterator[Violation]:
    for match in LINK.finditer(text):
        target, anchor = match.group(1), match.group(2)
        page = (root / path).parent / target if target else root / path
        if not page.exists():
            yield _at(path, text, match, f"link to {target}, which does not exist")
        elif anchor and page.suffix == ".md":
            if anchor[1:] not in heading_anchors(text if not target else page.read_text()):
                yield _at(path, text, match, f"link to {target}{anchor}: no such heading")


def heading_anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check_named_things(root: Path, path: str, text: str) -> Iterator[Violation]:
    """Files in backticks (`path` or `path::function`) and make targets exist."""
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE))
    for match in CODE_PATH.finditer(text):
        file, function = root / match.group(1), match.group(2)
        if not file.exists():
            yield _at(path, text, match, f"{match.group(1)} does not exist")
        elif function and f"def {function}(" not in file.read_text():
            yield _at(path, text, match, f"{match.group(1)} has no function {function}")
    for match in MAKE_TARGET.finditer(text):
        if match.group(1) not in targets:
            yield _at(path, text, match, f"the Makefile has no target {match.group(1)}")


def check_flags(path: str, text: str, known: frozenset[str]) -> Iterator[Violation]:
    """Flags in code blocks that start one of our own programs are flags that some program of ours defines."""
    for block in FENCE.finditer(text):
        if block.group(1) not in ("bash", "sh", "console"):
            continue
        for line in re.finditer(r".+", block.group(2)):
            if not OUR_COMMANDS.search(line.group()):
                continue
            for flag in FLAG.finditer(line.group()):
                if flag.group() not in known:
                    number = text.count("\n", 0, block.start(2) + line.start()) + 1
                    yield Violation(path, number, "document", f"no program here has the flag {flag.group()}")


def known_flags(sources: list[Source]) -> frozenset[str]:
    """Flags that the code spells out (`"--port"`) or declares (`port: int = flag(...)`). Imports no code."""
    programs = [s for s in sources if s.folder != "tests" or s.path.endswith("__main__.py")]
    found = {name for source in programs for node in ast.walk(source.tree) for name in _flags(node)}
    return frozenset(found | {"--help"})


def _flags(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and FLAG.fullmatch(node.value):
        yield node.value
    if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
        if dotted_name(node.value.func) == "flag":
            yield "--" + dotted_name(node.target).replace("_", "-")


def _at(path: str, text: str, match: re.Match[str], message: str) -> Violation:
    return Violation(path, text.count("\n", 0, match.start()) + 1, "document", message)
