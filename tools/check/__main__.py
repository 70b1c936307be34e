"""Run every house rule over the tree; print what breaks one; exit 1 if anything does.

`--lines` prints the lines of code per package instead.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tools.check import layers, safety, shape
from tools.check.documents import check_document, known_flags, read_documents
from tools.check.source import Source, Violation, read_sources

Rule = Callable[[Source], Iterator[Violation]]
RULES: tuple[Rule, ...] = (
    layers.check_layers,
    shape.check_file_size,
    shape.check_function_size,
    shape.check_docstring,
    shape.check_names,
    shape.check_inheritance,
    shape.check_state,
    shape.check_field_counts,
    safety.check_banned,
    safety.check_environment,
    safety.check_silent_except,
    safety.check_unfinished,
)


def violations(root: Path) -> Iterator[Violation]:
    sources = []
    for source in read_sources(root):
        if (error := source.syntax_error()) is None:
            sources.append(source)
        else:
            yield source.violation(error.lineno or 1, "syntax", error.msg)
    for source in sources:
        for rule in RULES:
            yield from rule(source)
        yield from safety.check_local_paths(source.path, source.text)
    flags = known_flags(sources)
    for path, text in read_documents(root):
        yield from check_document(root, path, text, flags)
        yield from safety.check_local_paths(path, text)


def line_report(sources: list[Source]) -> str:
    """Lines of each package (docstrings and comments included: they are read, too)."""
    counts: Counter[str] = Counter()
    for source in sources:
        parts = source.path.split("/")[:-1]
        counts["/".join(parts[:3])] += source.text.count("\n")
    rows = [f"{lines:>7}  {package}" for package, lines in sorted(counts.items())]
    totals = Counter(dict.fromkeys((source.folder for source in sources), 0))
    for package, lines in counts.items():
        totals[package.split("/")[0]] += lines
    return "\n".join([*rows, *(f"{lines:>7}  total of {folder}" for folder, lines in totals.items())])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.check", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2])
    parser.add_argument("--lines", action="store_true", help="print lines per package")
    args = parser.parse_args()
    if args.lines:
        print(line_report(read_sources(args.root)))
        return 0
    found = list(violations(args.root))
    for violation in found:
        print(violation)
    print(f"house rules: {len(found)} violation{'' if len(found) == 1 else 's'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
