"""Rules about calls that are dangerous, hidden inputs, and work left unfinished."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tools.check.layers import imported_names, package_of, top_level
from tools.check.source import Source, Violation, dotted_name

BANNED_MODULES = frozenset({"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"})
BANNED_CALLS = frozenset(
    {
        "eval",
        "exec",
        "compile",
        "__import__",
        "torch.load",
        "torch.jit.load",
        "torch.hub.load",
        "os.system",
        "os.popen",
        "yaml.load",
        "yaml.unsafe_load",
        "multiprocessing.Queue",  # the next four carry their items by pickle
        "multiprocessing.Pipe",
        "multiprocessing.Manager",
        "multiprocessing.Pool",
        "concurrent.futures.ProcessPoolExecutor",
        "ProcessPoolExecutor",
    }
)
BANNED_METHODS = frozenset(
    {"send_pyobj", "recv_pyobj", "all_gather_object", "broadcast_object_list", "gather_object"}
)
ENVIRONMENT = frozenset({"os.environ", "os.getenv", "os.environb", "os.putenv", "sys.argv"})
ENVIRONMENT_READERS = ("trunkline.config", "trunkline.cli.main", "trunkline.launch_server")
UNFINISHED = re.compile(r"#.*\b(TODO|FIXME|XXX|HACK)\b")
LOCAL_PATH = re.compile(r"(?<![\w.~:/}])/(?:home|root|Users|work|tmp|mnt|opt)/\w")


def check_banned(source: Source) -> Iterator[Violation]:
    """Nothing that runs data as code. Tests may: they build the booby traps that the engine must refuse."""
    if source.folder == "tests":
        return
    for node in ast.walk(source.tree):
        for name in imported_names(node, source.module):
            if top_level(name, BANNED_MODULES):
                yield source.violation(node, "banned", f"import of {name.split('.')[0]}")
        if isinstance(node, ast.Call):
            name = dotted_name(node.func)
            if name in BANNED_CALLS or name.split(".")[-1] in BANNED_METHODS:
                yield source.violation(node, "banned", f"call of {name}")
            for keyword in node.keywords:
                unsafe = keyword.arg in ("shell", "allow_pickle", "trust_remote_code")
                if unsafe and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False):
                    yield source.violation(node, "banned", f"{name}({keyword.arg}=...)")


def check_environment(source: Source) -> Iterator[Violation]:
    """Only config reads the environment or the command line; what the rest needs, it is given.

    The `if __name__ == "__main__"` of a process's entry may hand `sys.argv` on.
    """
    if package_of(source.module) is None or source.module.startswith(ENVIRONMENT_READERS):
        return
    body = [statement for statement in source.tree.body if not _is_main_guard(statement)]
    for node in (inner for statement in body for inner in ast.walk(statement)):
        names = imported_names(node, source.module)
        if isinstance(node, ast.Attribute):
            names.append(dotted_name(node))
        for name in ENVIRONMENT.intersection(names):
            yield source.violation(node, "environment", f"{name} outside config: pass the value in")


def _is_main_guard(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"


def check_silent_except(source: Source) -> Iterator[Violation]:
    """No handler that swallows everything: it hides the fault that a promise is about."""
    broad = {"Exception", "BaseException"}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            is_broad = any(kind is None or dotted_name(kind) in broad for kind in kinds)
            if is_broad and all(_does_nothing(statement) for statement in node.body):
                yield source.violation(node, "silent-except", "name the exception, or report it")
        elif isinstance(node, ast.Call) and dotted_name(node.func).split(".")[-1] == "suppress":
            if any(dotted_name(argument) in broad for argument in node.args):
                yield source.violation(node, "silent-except", "suppress the exceptions you expect, by name")


def _does_nothing(statement: ast.stmt) -> bool:
    is_constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return is_constant or isinstance(statement, ast.Pass | ast.Continue)


def check_unfinished(source: Source) -> Iterator[Violation]:
    """No stubs and no notes to self in the product: finish it, or refuse it by name."""
    if source.folder != "src":
        return
    for number, line in enumerate(source.text.splitlines(), 1):
        if match := UNFINISHED.search(line):
            yield source.violation(number, "unfinished", match.group(1))
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if dotted_name(raised) == "NotImplementedError":
                yield source.violation(node, "unfinished", "NotImplementedError: use a Protocol, or build it")


def check_local_paths(path: str, text: str) -> Iterator[Violation]:
    """No path of one person's machine, in code or in documents."""
    for number, line in enumerate(text.splitlines(), 1):
        if match := LOCAL_PATH.search(line):
            yield Violation(path, number, "local-path", f"{match.group(0)}... exists on one machine only")
