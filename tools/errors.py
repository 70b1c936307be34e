"""The codes of errors as the sources use them, and the page that explains them."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence

from tools.check.source import Source
from trunkline.config.errors import ERRORS, Known

# Errors whose code is an argument by place, and which one.
BY_PLACE: Mapping[str, int] = {"ModelError": 1, "Failed": 1, "_invalid": 2}
DEFAULT_STATUS = 400


def codes_in(sources: Sequence[Source]) -> dict[str, set[tuple[str, int]]]:
    """Code -> (module, HTTP status) of each place in the package that raises it."""
    found: dict[str, set[tuple[str, int]]] = {}
    for source in sources:
        if source.folder != "src":
            continue
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call):
                for code in _codes(node):
                    found.setdefault(code, set()).add((source.module, _status(node)))
    return found


def _codes(call: ast.Call) -> Iterator[str]:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    for keyword in call.keywords:
        if keyword.arg == "code":
            yield from _texts(keyword.value)
    place = BY_PLACE.get(name)
    if place is not None and place < len(call.args):
        yield from _texts(call.args[place])


def _texts(node: ast.expr) -> Iterator[str]:
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.IfExp():
            yield from _texts(node.body)
            yield from _texts(node.orelse)
        case ast.BoolOp():
            for value in node.values:
                yield from _texts(value)


def _status(call: ast.Call) -> int:
    for keyword in call.keywords:
        match keyword:
            case ast.keyword(arg="status", value=ast.Constant(value=int(status))):
                return status
    return DEFAULT_STATUS


def mismatches(used: Mapping[str, object], table: Mapping[str, Known] = ERRORS) -> list[str]:
    """What is wrong between the codes that are used and the table that explains them."""
    missing = [
        f"the error code {code} has no entry in trunkline/config/errors.py" for code in used.keys() - table
    ]
    unused = [
        f"nothing uses the error code {code} of trunkline/config/errors.py" for code in table.keys() - used
    ]
    return sorted(missing + unused)


def error_catalog(sources: Sequence[Source]) -> str:
    """The page docs/errors.md. Raises SystemExit for a code without an entry, or an entry without use."""
    used = codes_in(sources)
    wrong = mismatches(used)
    if wrong:
        raise SystemExit("\n".join(wrong))
    lines = [
        "# Errors",
        "",
        "Made by `make docs` from `src/trunkline/config/errors.py`; `make check` fails for a code without",
        "entry. Every refusal has a `code`, which stays the same from version to version, a `message` with",
        "the numbers, and, where there is one, the field or flag in `param`. Errors of grammars add a JSON",
        "`pointer`.",
        "",
        "```",
        '{"error": {"message": "temperature is -1; it must be finite and at least 0",',
        '           "type": "invalid_request_error", "param": "temperature", "code": "out_of_range"}}',
        "```",
        "",
        "The status is that of HTTP where the error reaches a client; errors of flags and commands end the",
        "program with exit status 2.",
        "",
        "| code | status | cause | what to do | raised in |",
        "|---|---|---|---|---|",
    ]
    for code in sorted(used):
        known, places = ERRORS[code], used[code]
        statuses = ", ".join(map(str, sorted({status for _, status in places})))
        modules = ", ".join(
            f"`{module.removeprefix('trunkline.')}`" for module in sorted({m for m, _ in places})
        )
        lines.append(f"| `{code}` | {statuses} | {known.cause} | {known.fix} | {modules} |")
    return "\n".join(lines) + "\n"
