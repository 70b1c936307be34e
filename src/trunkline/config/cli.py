"""From words or keyword arguments to a checked table of flags. The only reader of argv.

A table is a dataclass of `flag(...)` fields; the engine's own is `flags.Args`, and commands extend it.
Anything that a table does not have is refused by name: with the reason if the reference interface has it,
with the nearest spelling if it looks like a slip.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from trunkline.config.flags import ENGINE_GROUPS, Flag, Value, flags_of, spelling
from trunkline.config.reference import ALWAYS_SO, REFUSED_VALUES, SAME_FLAG, refused_flags
from trunkline.config.schema import SECRETS
from trunkline.types import RequestError

T = TypeVar("T")

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_WIDTH = 100  # columns of the help text
_WANTED: Mapping[str, str] = {
    "int": "a whole number",
    "float": "a number",
    "size": "a size such as 4GiB or 500MB",
}


def argv() -> list[str]:
    """The words after the program name."""
    return sys.argv[1:]


def environment_with(name: str, value: str) -> dict[str, str]:
    """The environment of this process and a variable more, for a process that it starts."""
    return {**os.environ, name: value}


def shift_argv() -> str:
    """Take the first word after the program name away."""
    return sys.argv.pop(1)


def launch_command() -> str:
    """The command line of this process, without secrets."""
    secrets = {spelling(name) for name in SECRETS}
    shown = [Path(sys.argv[0]).name]
    hide = False
    for word in sys.argv[1:]:
        name, equals, _ = word.partition("=")
        shown.append("***" if hide else f"{name}=***" if equals and name in secrets else word)
        hide = word in secrets
    return shlex.join(shown)


def parse(words: Sequence[str], table: type[T]) -> T:
    """Flags from command-line words. The last of repeated flags counts.

    Raises RequestError with `param` naming the flag; code `unknown_flag`, `unsupported_flag`, `invalid_flag`.
    """
    attributes = _attributes(table)
    given: dict[str, Value] = {}
    accepted: list[str] = []
    rest = list(reversed(words))
    while rest:
        name, equals, inline = rest.pop().partition("=")
        if not name.startswith("--") or name == "--":
            raise RequestError(
                f"unexpected argument {name!r}: every value needs its flag, for example --model-path {name}",
                code="unknown_flag",
                param=name,
            )
        value: str | None = inline if equals else None
        attribute = attributes.get(name)
        if attribute is None:
            if value is None and rest and not rest[-1].startswith("--") and _takes_value(name):
                value = rest.pop()
            accepted.append(_accept_reference(name, value or "", attributes))
            continue
        meta = flags_of(table)[attribute]
        if meta.kind == "bool":
            if value is not None:
                raise _invalid(name, f"is a switch and takes no value, but got {value!r}")
            given[attribute] = True
            continue
        if value is None:
            if not rest or rest[-1].startswith("--"):
                raise _invalid(name, "needs a value")
            value = rest.pop()
        given[attribute] = _from_text(name, value, meta)
    return _build(table, given, accepted)


def from_kwargs(kwargs: Mapping[str, object], table: type[T]) -> T:
    """Flags from keyword arguments (`page_size=16`), as `Engine(...)` takes them. None means "not given".

    Raises RequestError as `parse` does.
    """
    attributes = _attributes(table)
    given: dict[str, Value] = {}
    accepted: list[str] = []
    for key, value in kwargs.items():
        name = spelling(key)
        attribute = attributes.get(name)
        if attribute is None:
            off = value is None or (value is False and SAME_FLAG.get(name, name) not in ALWAYS_SO)
            if not (off and _known(name)):
                accepted.append(_accept_reference(name, "" if value is True else str(value), attributes))
        elif value is not None:
            given[attribute] = _from_object(name, value, flags_of(table)[attribute])
    return _build(table, given, accepted)


def help_text(usage: str, about: str, table: type, hide: Iterable[str] = ()) -> str:
    """The `--help` page of a command, from its table of flags: its own first, those of `hide` left out."""
    lines = [f"usage: {usage}", "", *_wrap(about, 0)]
    defaults = {f.name: f.default for f in fields(table)}
    groups: dict[str, list[str]] = {}
    for attribute, meta in flags_of(table).items():
        if attribute in hide:
            continue
        words = ", ".join((spelling(attribute), *meta.aliases))
        entry = groups.setdefault(meta.group or "options", [])
        head = f"  {words}{'' if meta.kind == 'bool' else ' ' + _value_word(meta)}"
        choices = ""
        if len(head) > _WIDTH:
            head, choices = f"  {words} NAME", f". One of {', '.join(meta.choices)}"
        entry.append(head)
        default = defaults[attribute]
        note = "" if default in (None, False, MISSING) else f" (default: {default})"
        entry.extend(_wrap(meta.help + choices + note, 6))
    own = [name for name in groups if name not in ENGINE_GROUPS]
    for group in (*own, *(name for name in ENGINE_GROUPS if name in groups)):
        entries = groups[group]
        lines += ["", f"{group}:", *entries]
    return "\n".join(lines) + "\n"


def _attributes(table: type) -> dict[str, str]:
    """Every spelling a table has -> its attribute."""
    return {name: key for key, meta in flags_of(table).items() for name in (spelling(key), *meta.aliases)}


def _build(table: type[T], given: dict[str, Value], accepted: list[str]) -> T:
    extra: dict[str, Any] = {"accepted": tuple(accepted)} if accepted else {}
    return table(**given, **extra)


def _known(name: str) -> bool:
    name = SAME_FLAG.get(name, name)
    return name in ALWAYS_SO or name in refused_flags()


def _takes_value(name: str) -> bool:
    """Whether a flag that no table has should swallow the next word. Refused ones fail anyway."""
    values, _ = ALWAYS_SO.get(SAME_FLAG.get(name, name), (("",), ""))
    return values != ("",)


def _accept_reference(name: str, value: str, attributes: Mapping[str, str]) -> str:
    """A flag outside of the table: returns it when it asks for what always holds, else raises."""
    main = SAME_FLAG.get(name, name)
    if "page_size" in attributes.values():  # an engine's table: the reference interface applies
        if main in ALWAYS_SO:
            values, fact = ALWAYS_SO[main]
            if value in values:
                return f"{name}{' ' * bool(value)}{value}"
            if values == ("",):
                raise _invalid(name, f"cannot be {value!r}: {fact}", code="unsupported_flag")
            raise _invalid(
                name,
                f"{value or '(no value)'} is not built: {fact} (only {' | '.join(values)} is accepted)",
                code="unsupported_flag",
            )
        why = refused_flags().get(main)
        if why is not None:
            raise _invalid(name, f"is not supported: {why}", code="unsupported_flag")
    from difflib import get_close_matches

    near = get_close_matches(name, attributes, n=1)
    hint = f"; did you mean {near[0]}?" if near else "; --help lists what there is"
    raise _invalid(name, f"is not a flag{hint}", code="unknown_flag")


def _invalid(name: str, what: str, *, code: str = "invalid_flag") -> RequestError:
    return RequestError(f"{name} {what}", code=code, param=name)


def parse_size(text: str) -> int:
    """Bytes of "4GiB", "500MB", "1.5g" (binary), or a plain number. Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    number, unit, binary = match.groups()
    decimal = unit and not binary and text.strip().lower().endswith("b")
    return int(float(number) * (1000 if decimal else 1024) ** " kmgt".index(unit.lower() or " "))


def _from_text(name: str, text: str, meta: Flag) -> Value:
    try:
        if meta.kind == "int":
            return _in_range(name, int(text), meta)
        if meta.kind == "float":
            return _in_range(name, float(text), meta)
        if meta.kind == "size":
            return _in_range(name, parse_size(text), meta)
    except ValueError:
        raise _invalid(name, f"must be {_WANTED[meta.kind]}, not {text!r}") from None
    if not text:
        raise _invalid(name, "must not be empty")
    return _in_choices(name, text, meta)


def _from_object(name: str, value: object, meta: Flag) -> Value:
    if meta.kind == "bool":
        if not isinstance(value, bool):
            raise _invalid(name, f"must be True or False, not {value!r}")
        return value
    if isinstance(value, str) or (meta.kind in ("text", "path") and hasattr(value, "__fspath__")):
        return _from_text(name, str(value), meta)
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if meta.kind == "float" and number:
        return _in_range(name, float(value), meta)  # type: ignore[arg-type]
    if meta.kind in ("int", "size") and number and isinstance(value, int):
        return _in_range(name, value, meta)
    raise _invalid(name, f"must be {_WANTED.get(meta.kind, 'text')}, not {value!r}")


def _in_choices(name: str, text: str, meta: Flag) -> str:
    values, why = REFUSED_VALUES.get(name, ((), ""))
    if text in values:
        raise _invalid(name, f"{text} is not supported: {why}", code="unsupported_flag")
    if meta.choices and text not in meta.choices:
        raise _invalid(name, f"must be one of {', '.join(meta.choices)}, not {text!r}")
    return text


def _in_range(name: str, value: int | float, meta: Flag) -> int | float:
    low, high = meta.low, meta.high
    inside = (low is None or value >= low) and (high is None or value <= high)  # false for nan
    if inside or value in meta.also:
        return value
    also = "".join(f" or {v:g}" for v in meta.also)
    bounds = f"at least {low:.16g}" if high is None else f"between {low:.16g} and {high:.19g}"
    raise _invalid(name, f"must be {bounds}{also}, not {value}")


def _value_word(meta: Flag) -> str:
    if meta.choices:
        return "{" + ",".join(meta.choices) + "}"
    return meta.metavar or {"int": "N", "float": "X", "path": "FILE", "size": "SIZE"}.get(meta.kind, "NAME")


def _wrap(text: str, indent: int) -> list[str]:
    lines, line = [], " " * indent
    for word in text.split():
        if len(line) + len(word) + 1 > _WIDTH and line.strip():
            lines.append(line)
            line = " " * indent
        line += word if not line.strip() else " " + word
    return [*lines, line]


def wants_help(words: Sequence[str]) -> bool:
    return "--help" in words or "-h" in words
