"""What every rule reads and yields."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

CODE_FOLDERS = ("src", "tools", "training", "benchmarks", "tests")
SKIPPED_FOLDERS = frozenset({"__pycache__", "build", "dist"})


@dataclass(frozen=True)
class Violation:
    path: str
    line: int
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}: {self.message}"


@dataclass(frozen=True)
class Source:
    """One Python file. `path` is relative to the repository's root, with forward slashes."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    def syntax_error(self) -> SyntaxError | None:
        try:
            ast.parse(self.text)
        except SyntaxError as error:
            return error
        return None

    @property
    def folder(self) -> str:
        """First part of the path: src, tools, training, benchmarks or tests."""
        return self.path.split("/", 1)[0]

    @property
    def module(self) -> str:
        """Dotted name, e.g. `trunkline.cache.radix`; a package's `__init__` has the package's name."""
        name = self.path.removeprefix("src/").removesuffix(".py").removesuffix("/__init__")
        return name.replace("/", ".")

    def violation(self, node: ast.AST | int, rule: str, message: str) -> Violation:
        line = node if isinstance(node, int) else getattr(node, "lineno", 1)
        return Violation(self.path, line, rule, message)


def read_sources(root: Path) -> list[Source]:
    return [
        Source(path.relative_to(root).as_posix(), path.read_text())
        for folder in CODE_FOLDERS
        for path in sorted((root / folder).rglob("*.py"))
        if not SKIPPED_FOLDERS.intersection(path.parts)
    ]


def dotted_name(node: ast.expr) -> str:
    """`a.b.c` of an expression made of names and attributes, without subscripts; "" for any other."""
    if isinstance(node, ast.Subscript):
        return dotted_name(node.value)
    if isinstance(node, ast.Attribute):
        base = dotted_name(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def statements_at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported: into if, try, with and loops, not into functions,
    classes, or `if TYPE_CHECKING`."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If):
            if dotted_name(statement.test).split(".")[-1] != "TYPE_CHECKING":
                yield from statements_at_import(statement.body)
            yield from statements_at_import(statement.orelse)
        elif isinstance(statement, ast.Try):
            handlers = [inner for handler in statement.handlers for inner in handler.body]
            yield from statements_at_import(
                [*statement.body, *handlers, *statement.orelse, *statement.finalbody]
            )
        elif isinstance(statement, ast.With | ast.For | ast.While):
            yield from statements_at_import(statement.body)
