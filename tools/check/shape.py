"""Rules about size, names and state."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from tools.check.source import Source, Violation, dotted_name, statements_at_import

MAX_FILE_LINES = 800
MAX_FUNCTION_LINES = 80
MAX_BATCH_FIELDS = 11
MAX_CONFIG_FIELDS = 90

VAGUE_FILE = re.compile(r"(^|_)(utils?|helpers?|common|misc|v[2-9])$")
VAGUE_CLASS = re.compile(r"(Manager|Helper|Utils?|V[2-9])$")
PURE_BASES = frozenset({"Protocol", "Generic", "ABC", "Enum", "IntEnum", "StrEnum", "Flag", "str", "int"})
READ_ONLY_TYPES = frozenset({"Mapping", "Sequence", "Collection", "AbstractSet"})
MUTABLE_DISPLAYS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MUTABLE_CALLS = frozenset(
    "list dict set bytearray defaultdict deque Counter OrderedDict ChainMap count Lock RLock Event Condition "
    "WeakValueDictionary WeakKeyDictionary WeakSet ContextVar local SimpleNamespace".split()
)


def check_file_size(source: Source) -> Iterator[Violation]:
    lines = source.text.count("\n")
    if lines >= MAX_FILE_LINES:
        yield source.violation(1, "file-size", f"{lines} lines, must be under {MAX_FILE_LINES}")


def check_function_size(source: Source) -> Iterator[Violation]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines >= MAX_FUNCTION_LINES:
                yield source.violation(
                    node,
                    "function-size",
                    f"{node.name} has {lines} lines, must be under {MAX_FUNCTION_LINES}",
                )


def check_docstring(source: Source) -> Iterator[Violation]:
    """Every module of the product says what it is; docs/modules.md is made of that."""
    if source.folder == "src" and source.text.strip() and not ast.get_docstring(source.tree):
        yield source.violation(1, "docstring", "the module has none")


def check_names(source: Source) -> Iterator[Violation]:
    stem = PurePosixPath(source.path).stem
    if VAGUE_FILE.search(stem):
        yield source.violation(1, "vague-name", f"{stem}.py says nothing: name the thing")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ClassDef) and VAGUE_CLASS.search(node.name):
            yield source.violation(node, "vague-name", f"class {node.name}: name what it is")


def check_inheritance(source: Source) -> Iterator[Violation]:
    """No mixins: at most one base that brings behavior. Protocols, enums and exceptions may be added."""
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.ClassDef):
            continue
        if node.name.endswith("Mixin"):
            yield source.violation(node, "mixin", f"class {node.name}: compose instead")
        bases = [dotted_name(base).split(".")[-1] for base in node.bases]
        real = [
            base for base in bases if base not in PURE_BASES and not base.endswith(("Error", "Exception"))
        ]
        if len(real) > 1:
            yield source.violation(node, "mixin", f"class {node.name} inherits from {' and '.join(real)}")


def check_state(source: Source) -> Iterator[Violation]:
    """No module-level mutable state: tables are tuples, frozensets, `MappingProxyType`, or annotated with a
    type that has no way to change them (`Mapping`, `Sequence`), which mypy enforces; no `global`.

    In tests and training only `global` is looked for: their tables can't leak between users.
    """
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            yield source.violation(node, "state", f"global {', '.join(node.names)}: pass the object instead")
    if source.folder not in ("src", "tools"):
        return
    for statement in statements_at_import(source.tree.body):
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names = [dotted_name(target) for target in targets]
            exempt = names == ["__all__"] or _is_read_only(statement)
            if _is_mutable(statement.value) and not exempt:
                yield source.violation(
                    statement,
                    "state",
                    f"{', '.join(names)} is mutable and lives as long as the module: "
                    "use a tuple or frozenset, annotate it as Mapping or Sequence, or put it into an object",
                )


def _is_read_only(statement: ast.Assign | ast.AnnAssign) -> bool:
    return isinstance(statement, ast.AnnAssign) and dotted_name(statement.annotation) in READ_ONLY_TYPES


def _is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        return dotted_name(value.func).split(".")[-1] in MUTABLE_CALLS
    return isinstance(value, MUTABLE_DISPLAYS)


def check_field_counts(source: Source) -> Iterator[Violation]:
    """ForwardBatch and EngineConfig stay small, so that neither becomes everybody's drawer."""
    classes = {node.name: node for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)}
    for name, most in (("ForwardBatch", MAX_BATCH_FIELDS), ("EngineConfig", MAX_CONFIG_FIELDS)):
        if name in classes and source.folder == "src":
            fields = count_leaf_fields(name, classes)
            if fields > most:
                yield source.violation(
                    classes[name], "field-count", f"{name} has {fields} fields, at most {most}"
                )


def count_leaf_fields(name: str, classes: dict[str, ast.ClassDef]) -> int:
    """Annotated fields of a class; a field that is a config group of the same file counts its own."""
    fields = [node for node in classes[name].body if isinstance(node, ast.AnnAssign)]
    types = [dotted_name(field.annotation) for field in fields]
    return sum(
        count_leaf_fields(kind, classes) if kind in classes and kind.endswith("Config") else 1
        for kind in types
    )
