"""What a request's fields may hold, as data: one rule per field, the same for HTTP bodies and `Engine` calls.

A table maps field names to rules. Nothing is ignored silently: a field that no rule knows, that is not
built, or whose value is out of bounds raises RequestError naming it (P2).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trunkline.text.stop_regex import compile_stop
from trunkline.types import MAX_LOGIT_BIAS, MAX_N, MAX_STOP_STRINGS, RequestError

MAX_REGEX = 256  # bytes of a stop_regex
INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1


@dataclass(frozen=True)
class Rule:
    """Base of all rules: accepts any value. A null means "not given" and never reaches a rule that is not
    `nullable`."""

    nullable = False

    def read(self, value: Any, name: str) -> Any:
        """The value to use. Raises RequestError naming `name`."""
        return value

    def schema(self) -> dict[str, Any]:
        """JSON schema of what it accepts, null aside; it may accept less than that, never more."""
        return {}


@dataclass(frozen=True)
class Number(Rule):
    """A finite number in [low, high], or one of `also`. `above`: low itself is out."""

    low: float = -math.inf
    high: float = math.inf
    integer: bool = False
    above: bool = False
    also: tuple[float, ...] = ()
    nullable: bool = False

    def read(self, value: Any, name: str) -> Any:
        kinds = int if self.integer else (int, float)
        if value is None and self.nullable:
            return None
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise wrong_type(name, "an integer" if self.integer else "a number", value)
        inside = (self.low < value if self.above else self.low <= value) and value <= self.high
        if not (inside or value in self.also) or not abs(value) <= sys.float_info.max:
            raise RequestError(
                f"{name} is {_short(value)}; it must be {self._range()}", code="out_of_range", param=name
            )
        return value if self.integer else float(value)

    def schema(self) -> dict[str, Any]:
        bounds: dict[str, Any] = {"type": "integer" if self.integer else "number"}
        if self.low != -math.inf:
            bounds["exclusiveMinimum" if self.above else "minimum"] = self.low
        if self.high != math.inf:
            bounds["maximum"] = self.high
        return {"anyOf": [bounds, {"enum": list(self.also)}]} if self.also else bounds

    def _range(self) -> str:
        parts = [f"{bound:g}" if abs(bound) < 1e6 else f"{bound:.0f}" for bound in self.also]
        if self.low == -math.inf and self.high == math.inf:
            parts.append("finite")
        elif self.high == math.inf:
            parts.append(f"finite and {'above' if self.above else 'at least'} {self.low:g}")
        else:
            low, high = (int(bound) if bound == int(bound) else bound for bound in (self.low, self.high))
            parts.append(f"in {'(' if self.above else '['}{low}, {high}]")
        return " or ".join(parts)


@dataclass(frozen=True)
class Text(Rule):
    """A string of `shortest` to `longest` characters."""

    longest: int = 512
    shortest: int = 0

    def read(self, value: Any, name: str) -> str:
        if not isinstance(value, str):
            raise wrong_type(name, "a string", value)
        if not self.shortest <= len(value) <= self.longest:
            raise RequestError(
                f"{name} has {len(value)} characters; it must have {self.shortest} to {self.longest}",
                code="out_of_range",
                param=name,
            )
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "minLength": self.shortest, "maxLength": self.longest}


@dataclass(frozen=True)
class Flag(Rule):
    """true or false."""

    def read(self, value: Any, name: str) -> bool:
        if not isinstance(value, bool):
            raise wrong_type(name, "true or false", value)
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Items(Rule):
    """A list of at most `most` values, or one bare value if `bare`."""

    of: Rule
    most: int
    bare: bool = False
    fewest: int = 0

    def read(self, value: Any, name: str) -> list[Any]:
        if self.bare and not isinstance(value, list | tuple):
            return [self.of.read(value, name)]
        if not isinstance(value, list | tuple):
            raise wrong_type(name, "a list", value)
        if not self.fewest <= len(value) <= self.most:
            raise RequestError(
                f"{name} has {len(value)} entries; it may have {self.fewest} to {self.most}",
                code="out_of_range",
                param=name,
            )
        return [self.of.read(item, f"{name}[{i}]") for i, item in enumerate(value)]

    def schema(self) -> dict[str, Any]:
        one = self.of.schema()
        several = {"type": "array", "items": one, "minItems": self.fewest, "maxItems": self.most}
        return {"anyOf": [one, several]} if self.bare else several


@dataclass(frozen=True)
class OneOf(Rule):
    """One of a few strings."""

    values: tuple[str, ...]

    def read(self, value: Any, name: str) -> str:
        if not isinstance(value, str):
            raise wrong_type(name, "a string", value)
        if value not in self.values:
            raise RequestError(
                f"{name} is {_short(value)}; it must be one of {', '.join(self.values)}",
                code="invalid_value",
                param=name,
            )
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.values)}


@dataclass(frozen=True)
class Object(Rule):
    """A JSON object; with a table, of these fields only."""

    fields: Mapping[str, Rule] | None = None

    def read(self, value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong_type(name, "an object", value)
        return value if self.fields is None else read_fields(self.fields, value, f"{name}.")

    def schema(self) -> dict[str, Any]:
        return {"type": "object"} if self.fields is None else object_schema(self.fields)


@dataclass(frozen=True)
class LogitBias(Rule):
    """An object from token ids, as strings, to biases in [-100, 100]."""

    def read(self, value: Any, name: str) -> dict[int, float]:
        if not isinstance(value, dict):
            raise wrong_type(name, "an object", value)
        if len(value) > MAX_LOGIT_BIAS:
            raise RequestError(
                f"{name} has {len(value)} entries; it may have {MAX_LOGIT_BIAS}",
                code="out_of_range",
                param=name,
            )
        bias = {}
        for token, amount in value.items():
            digits = str(token)
            if not (digits.isascii() and digits.isdigit() and len(digits) < 10):
                raise RequestError(
                    f"{name}: {_short(token)} is no token id", code="invalid_value", param=name
                )
            bias[int(digits)] = Number(-100, 100).read(amount, f"{name}.{digits}")
        return bias

    def schema(self) -> dict[str, Any]:
        return {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_LOGIT_BIAS,
        }


@dataclass(frozen=True)
class Unsupported(Rule):
    """Known, but not built (yet). Only values that ask for nothing are accepted, as if absent."""

    neutral: tuple[Any, ...] = ()
    instead: str = ""  # what the client can do

    def read(self, value: Any, name: str) -> None:
        if any(value == allowed and type(value) is type(allowed) for allowed in self.neutral):
            return
        hint = f": {self.instead}" if self.instead else ""
        raise RequestError(
            f"{name} is not supported by this server{hint}", code="unsupported_field", param=name
        )

    def schema(self) -> dict[str, Any]:
        return {
            "enum": [*self.neutral, None],
            "description": "not supported: only values that ask for nothing",
        }


@dataclass(frozen=True)
class StopRegex(Rule):
    """A regular expression of at most 256 bytes that can be looked for in linear time."""

    def read(self, value: Any, name: str) -> str:
        pattern = Text(MAX_REGEX).read(value, name)
        if len(pattern.encode(errors="replace")) > MAX_REGEX:
            raise RequestError(
                f"{name} has more than {MAX_REGEX} bytes: shorten it", code="out_of_range", param=name
            )
        try:
            compile_stop(pattern)
        except RequestError as error:
            message = error.message.replace("stop_regex", name, 1)
            raise RequestError(message, code=error.code, param=name) from error
        return pattern


def read_fields(table: Mapping[str, Rule], body: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields that were given, checked. Nulls and neutral values of unsupported fields are left out."""
    fields = {}
    for name, value in body.items():
        full = f"{prefix}{name}"
        rule = table.get(name)
        if rule is None:
            raise RequestError(
                f"{_short(full)} is no field of this request: check its spelling",
                code="unknown_field",
                param=full[:200],
            )
        if value is None and not rule.nullable:
            continue
        read = rule.read(value, full)
        if not isinstance(rule, Unsupported):
            fields[name] = read
    return fields


def object_schema(table: Mapping[str, Rule]) -> dict[str, Any]:
    """JSON schema of an object with these fields. Null is as good as not given."""
    properties = {name: _or_null(rule.schema()) for name, rule in table.items()}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return schema if not schema or None in schema.get("enum", ()) else {"anyOf": [schema, {"type": "null"}]}


def drop_unknown(
    table: Mapping[str, Rule], body: Mapping[str, Any], prefix: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """The body without fields that no rule knows, at any depth that a table describes, and their names."""
    kept: dict[str, Any] = {}
    dropped: list[str] = []
    for name, value in body.items():
        if name not in table:
            dropped.append(f"{prefix}{name}"[:200])
            continue
        kept[name], below = _drop_below(table[name], value, f"{prefix}{name}")
        dropped += below
    return kept, dropped


def _drop_below(rule: Rule, value: Any, name: str) -> tuple[Any, list[str]]:
    if isinstance(value, dict):
        table = getattr(getattr(rule, "of", rule), "fields", None)
        return (value, []) if table is None else drop_unknown(table, value, f"{name}.")
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        pairs = [_drop_below(getattr(rule, "of", rule), one, f"{name}[{i}]") for i, one in enumerate(value)]
        return [one for one, _ in pairs], [below for _, names in pairs for below in names]
    return value, []


def wrong_type(name: str, wanted: str, value: Any) -> RequestError:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string", list: "a list"}
    names |= {dict: "an object", type(None): "null", tuple: "a list"}
    got = names.get(type(value), f"a value of type {type(value).__name__}")
    return RequestError(f"{name} must be {wanted}, not {got}", code="invalid_type", param=name)


def _short(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 128:  # printing all digits is slow or refused
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


STOP = Items(Text(longest=1024, shortest=1), MAX_STOP_STRINGS, bare=True)
TOKEN_IDS = Items(Number(0, INT32_MAX, integer=True), 1024)
PENALTY = Number(-2, 2)

# `sampling_params` of /generate and of Engine.generate: fields of types.SamplingParams, and the known others.
SAMPLING_FIELDS: Mapping[str, Rule] = {
    "max_new_tokens": Number(0, INT32_MAX, integer=True, nullable=True),
    "min_new_tokens": Number(0, INT32_MAX, integer=True),
    "temperature": Number(0),
    "top_p": Number(0, 1, above=True),
    "top_k": Number(1, INT32_MAX, integer=True, also=(-1,)),
    "min_p": Number(0, 1),
    "frequency_penalty": PENALTY,
    "presence_penalty": PENALTY,
    "repetition_penalty": Number(0, 2, above=True),
    "logit_bias": LogitBias(),
    "stop": STOP,
    "stop_token_ids": TOKEN_IDS,
    "ignore_eos": Flag(),
    "sampling_seed": Number(-INT64_MAX, INT64_MAX, integer=True),
    "n": Number(1, MAX_N, integer=True),
    "skip_special_tokens": Flag(),
    "spaces_between_special_tokens": Flag(),
    "no_stop_trim": Flag(),
    "stop_regex": Items(StopRegex(), MAX_STOP_STRINGS, bare=True),
    "beam_width": Unsupported((1,)),
    "stream_interval": Number(1, 1024, integer=True),
    "custom_params": Unsupported(({},)),
    "watermark": Unsupported((False,)),
}
