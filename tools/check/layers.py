"""Which package may import which: the one place that says it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from types import MappingProxyType

from tools.check.source import Source, Violation, statements_at_import

# Bottom to top. A module imports its own package and packages of lower rows, never a neighbor in its row.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("types",),
    ("messages", "http"),
    ("config",),
    ("kernels", "distributed"),
    ("layers", "attention"),
    ("models",),
    ("cache", "grammar"),
    ("text", "scheduler", "worker"),
    ("engine",),
    ("lang",),
    ("metrics",),
    ("server",),
    ("bench",),
    ("cli",),
    ("launch_server",),
)
HEIGHT = MappingProxyType({package: row for row, packages in enumerate(LAYERS) for package in packages})

# The scheduler-worker contract: the only import between neighbors.
SHARED = frozenset({("worker", "trunkline.scheduler.plan"), ("worker", "trunkline.scheduler.plan.StepPlan")})

TORCH_PACKAGES = frozenset({"kernels", "distributed", "layers", "attention", "models", "worker"})
NEVER_TORCH = frozenset(
    {"types", "messages", "config", "cache", "grammar", "scheduler", "text", "server", "metrics"}
)
LATE_TORCH = frozenset({"", "engine", "lang", "bench", "cli", "launch_server"})  # inside functions only
TORCH_LIBRARIES = frozenset({"torch", "safetensors.torch"})
TEST_ONLY_LIBRARIES = frozenset(
    {"transformers", "pytest", "hypothesis", "openai", "anthropic", "httpx", "jsonschema"}
)


def check_layers(source: Source) -> Iterator[Violation]:
    if source.folder == "tests":
        return
    package = package_of(source.module)
    at_import = set(statements_at_import(source.tree.body))
    for statement in ast.walk(source.tree):
        for name in imported_names(statement, source.module):
            if top_level(name, TEST_ONLY_LIBRARIES):
                yield source.violation(statement, "test-library", f"{name} is for tests only")
            if package is None:
                continue
            yield from _check_height(source, package, statement, name)
            if _is_torch(name) and (
                package in NEVER_TORCH or (package in LATE_TORCH and statement in at_import)
            ):
                where = "at import; import it inside the function" if package in LATE_TORCH else "at all"
                yield source.violation(
                    statement, "torch-free", f"{source.module} may not load torch (through {name}) {where}"
                )


def _check_height(source: Source, package: str, statement: ast.AST, name: str) -> Iterator[Violation]:
    target = package_of(name)
    if not target or not package or target == package:
        return
    for unknown in {package, target} - HEIGHT.keys():
        yield source.violation(
            statement, "layers", f"package {unknown!r} has no place in LAYERS of tools/check/layers.py"
        )
        return
    if HEIGHT[target] >= HEIGHT[package] and (package, _module_part(name)) not in SHARED:
        yield source.violation(statement, "layers", f"{package} may not import {name}: it is not below")


def _module_part(name: str) -> str:
    return name.rsplit(".", 1)[0] if name.rsplit(".", 1)[-1][:1].isupper() else name


def _is_torch(name: str) -> bool:
    return top_level(name, TORCH_LIBRARIES) or package_of(name) in TORCH_PACKAGES


def top_level(name: str, libraries: frozenset[str]) -> bool:
    return any(name == library or name.startswith(library + ".") for library in libraries)


def package_of(module: str) -> str | None:
    """`cache` of `trunkline.cache.radix`, "" of `trunkline` and its version, None outside of it."""
    first, *rest = module.split(".")
    if first != "trunkline":
        return None
    return rest[0] if rest and rest != ["__version__"] else ""


def imported_names(statement: ast.AST, module: str) -> list[str]:
    """Full dotted names that an import statement asks for; [] for other statements.

    `from a.b import c` gives `a.b.c`: whether c is a module or an object does not matter to any rule.
    """
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    if isinstance(statement, ast.ImportFrom):
        base = statement.module or ""
        if statement.level:
            parent = ".".join(module.split(".")[: -statement.level])
            base = f"{parent}.{base}".strip(".")
        return [f"{base}.{alias.name}" for alias in statement.names]
    return []
