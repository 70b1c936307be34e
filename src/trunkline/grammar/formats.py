"""The formats of JSON Schema as regular languages.

Dates know the days of each month and leap years. What a format leaves to other standards is cut down to the
part that everybody accepts (FORMATS says where): such a format can be asked for, but not negated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from trunkline.grammar.regex import Node, both, match_language


@dataclass(frozen=True)
class Format:
    """`patterns`: a text has the format if all of them match it; `whole`: and only then."""

    patterns: tuple[str, ...]
    whole: bool = True


_YEAR = "(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DAYS = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = f"(?:{_YEAR}-{_DAYS}|{_LEAP}-02-29)"
_CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,9})?"
_ZONE = "(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = f"{_BYTE}(?:\\.{_BYTE}){{3}}"
_H16 = "[0-9a-fA-F]{1,4}"
_LS32 = f"(?:{_H16}:{_H16}|{_IPV4})"
_IPV6 = "|".join(
    [
        f"(?:{_H16}:){{6}}{_LS32}",
        f"::(?:{_H16}:){{5}}{_LS32}",
        f"(?:{_H16})?::(?:{_H16}:){{4}}{_LS32}",
        f"(?:(?:{_H16}:){{0,1}}{_H16})?::(?:{_H16}:){{3}}{_LS32}",
        f"(?:(?:{_H16}:){{0,2}}{_H16})?::(?:{_H16}:){{2}}{_LS32}",
        f"(?:(?:{_H16}:){{0,3}}{_H16})?::{_H16}:{_LS32}",
        f"(?:(?:{_H16}:){{0,4}}{_H16})?::{_LS32}",
        f"(?:(?:{_H16}:){{0,5}}{_H16})?::{_H16}",
        f"(?:(?:{_H16}:){{0,6}}{_H16})?::",
    ]
)
_LABEL = "[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_TOP_LABEL = "[a-zA-Z](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_HOST = f"(?:{_LABEL}\\.)*{_TOP_LABEL}"
_ATOM = "[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]+"
_PCHAR = "(?:[a-zA-Z0-9._~!$&'()*+,;=:@-]|%[0-9a-fA-F]{2})"
_USER = "(?:[a-zA-Z0-9._~!$&'()*+,;=:-]|%[0-9a-fA-F]{2})*"
_NAME = "(?:[a-zA-Z0-9._~!$&'()*+,;=-]|%[0-9a-fA-F]{2})*"
_AUTHORITY = f"(?:{_USER}@)?(?:\\[(?:{_IPV6})\\]|{_NAME})(?::[0-9]*)?"
_TAIL = f"(?:\\?(?:{_PCHAR}|[/?])*)?(?:#(?:{_PCHAR}|[/?])*)?"
_ABSOLUTE = f"//{_AUTHORITY}(?:/{_PCHAR}*)*|/(?:{_PCHAR}+(?:/{_PCHAR}*)*)?"
_SCHEME = "[a-zA-Z][a-zA-Z0-9+.-]*"
_URI = f"{_SCHEME}:(?:{_ABSOLUTE}|{_PCHAR}+(?:/{_PCHAR}*)*|){_TAIL}"
_NO_COLON = "(?:[a-zA-Z0-9._~!$&'()*+,;=@-]|%[0-9a-fA-F]{2})+"
_RELATIVE = f"(?:{_ABSOLUTE}|{_NO_COLON}(?:/{_PCHAR}*)*|){_TAIL}"
_POINTER = "(?:/(?:[^~/]|~[01])*)*"
_TIME_PART = "T(?:[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?|[0-9]+M(?:[0-9]+S)?|[0-9]+S)"
_DAY_PART = "(?:[0-9]+Y(?:[0-9]+M(?:[0-9]+D)?)?|[0-9]+M(?:[0-9]+D)?|[0-9]+D)"

FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "date": Format((_DATE,)),
        "time": Format((_CLOCK + _ZONE,), whole=False),  # no leap seconds, at most nine digits of a second
        "date-time": Format((f"{_DATE}T{_CLOCK}{_ZONE}",), whole=False),
        "duration": Format((f"P(?:{_DAY_PART}(?:{_TIME_PART})?|{_TIME_PART}|[0-9]+W)",)),
        "uuid": Format(("[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",)),
        "ipv4": Format((_IPV4,)),
        "ipv6": Format((_IPV6,)),
        "hostname": Format((_HOST, "(?:.|\\n){1,253}"), whole=False),  # a name whose last label is no number
        "email": Format((f"{_ATOM}(?:\\.{_ATOM})*@{_HOST}", "[^@]{1,64}@[^@]{1,253}"), whole=False),
        "uri": Format((_URI,), whole=False),
        "uri-reference": Format((f"{_URI}|{_RELATIVE}",), whole=False),
        "json-pointer": Format((_POINTER,)),
        "relative-json-pointer": Format((f"(?:0|[1-9][0-9]*)(?:#|{_POINTER})",)),
    }
)

# Formats that bound no text: some say how a reader should take a value, int32 and int64 bound numbers.
ANNOTATIONS = frozenset({"float", "double", "password", "binary", "byte", "int32", "int64"})


@lru_cache(maxsize=32)
def format_language(name: str) -> Node:
    """Texts of a format of FORMATS."""
    return both([match_language(pattern) for pattern in FORMATS[name].patterns])
