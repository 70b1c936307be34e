"""Schemas by keyword, with valid and invalid values: what docs/structured-output.md says.

`Case.refused` is the pointer at which a schema is refused. The oracle of the tests is the jsonschema package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    schema: Any
    valid: tuple[Any, ...] = ()
    invalid: tuple[Any, ...] = ()
    refused: str | None = None
    note: str = ""  # why it is refused, in the words of the table


def case(schema: Any, valid: list[Any], invalid: list[Any]) -> Case:
    return Case(schema, tuple(valid), tuple(invalid))


def refused(schema: Any, pointer: str, note: str) -> Case:
    return Case(schema, refused=pointer, note=note)


SCALARS = [None, True, False, 0, -7, 12, 1.5, "", "text", '\u00e9\n"\\\t', "\U0001f600"]
OBJECTS = [{}, {"a": 1}, {"b": "x", "a": None}, {"x": {"y": [1, {"z": 2}]}}]
ARRAYS = [[], [1], ["a", None, True], [[], [[1]]], [{"a": []}]]
NODE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
    "required": ["value"],
    "additionalProperties": False,
}
CARD = {
    "oneOf": [
        {"properties": {"kind": {"const": "cash"}, "amount": {"type": "number"}}, "required": ["kind"]},
        {
            "properties": {"kind": {"const": "card"}, "number": {"type": "string", "pattern": "^[0-9]{4}$"}},
            "required": ["kind", "number"],
        },
    ],
    "type": "object",
}


GENERAL: dict[str, list[Case]] = {
    "true, {}": [case(True, SCALARS + OBJECTS + ARRAYS, []), case({}, [None, 1, "a", [{}], {"a": [1]}], [])],
    "type": [
        case({"type": "null"}, [None], [0, "", False, [], {}]),
        case({"type": "boolean"}, [True, False], [None, 0, "true"]),
        case({"type": "integer"}, [0, -1, 10**20], [1.5, "1", None, True]),
        case({"type": "number"}, [0, -1.25, 3e20, 12345.678], ["1", None, False]),
        case({"type": "string"}, ["", "a", '\u00e9"\\\n\u0001', "\U0001f600"], [1, None, ["a"]]),
        case({"type": "array"}, ARRAYS, [{}, "a", 1]),
        case({"type": "object"}, OBJECTS, [[], "a", None]),
        case({"type": ["integer", "null"]}, [1, None], [1.5, "a", []]),
    ],
    "enum": [
        case({"enum": ["a", 'b"c', 1, None, 2.5]}, ["a", 'b"c', 1, None, 2.5], ["b", 2, True, ""]),
        case(
            {"enum": [{"a": 1}, [1, {"b": 2}]]}, [{"a": 1}, [1, {"b": 2}]], [{"a": 2}, [1], {}, [1, {"b": 3}]]
        ),
        case({"type": "string", "enum": ["x", 1, "yy"]}, ["x", "yy"], [1, "y"]),
        case({"enum": ["aa", "ab", "b"], "pattern": "^a"}, ["aa", "ab"], ["b", "a"]),
    ],
    "const": [
        case({"const": {"a": [1, None], "b": "x"}}, [{"a": [1, None], "b": "x"}], [{"a": [1, None]}, {}, 1]),
        case({"const": 1}, [1], [2, True, "1"]),
        case({"const": "\u00e9/"}, ["\u00e9/"], ["e/", ""]),
    ],
    "$ref, $defs": [
        case({"$ref": "#/$defs/x", "$defs": {"x": {"type": "integer"}}}, [1], ["a", None]),
        case(
            {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
            [
                {"value": 1},
                {"next": {"value": 2}, "value": 1},
                {"value": 1, "next": {"value": 2, "next": {"value": 3}}},
            ],
            [{}, {"value": 1, "next": {}}, {"value": "a"}, {"value": 1, "next": {"value": 2, "next": 3}}],
        ),
        case({"$ref": "#/$defs/x", "maximum": 5, "$defs": {"x": {"minimum": 2}}}, [2, 5, "a"], [1, 6]),
        case({"$ref": "#name", "$defs": {"x": {"$anchor": "name", "type": "null"}}}, [None], [1, "a"]),
        case({"type": "array", "items": {"$ref": "#"}}, [[], [[]], [[], [[]]]], [1, [1], {}]),
        case(
            {"properties": {"a/b~": {"$ref": "#/$defs/a~1b"}}, "$defs": {"a/b": {"type": "null"}}},
            [{"a/b~": None}, {}],
            [{"a/b~": 1}],
        ),
        refused({"$ref": "https://example.com/x"}, "/$ref", "references out of the schema"),
        refused({"$dynamicRef": "#x"}, "/$dynamicRef", "$dynamicRef and other unknown keywords"),
    ],
    "allOf": [
        case({"allOf": [{"minimum": 1}, {"maximum": 3}, {"type": "integer"}]}, [1, 2, 3], [0, 4, 1.5, "a"]),
        case(
            {
                "allOf": [
                    {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
                    {"properties": {"b": {"type": "string"}}, "required": ["b"]},
                ],
                "type": "object",
            },
            [{"a": 1, "b": "x"}, {"b": "x", "a": 1}, {"a": 1, "c": 2, "b": ""}],
            [{"a": 1}, {"b": "x"}, {"a": "x", "b": "x"}, {"a": 1, "b": 1}, 3],
        ),
        case(
            {"allOf": [{"pattern": "a"}, {"pattern": "b$"}], "type": "string"},
            ["ab", "xaxb"],
            ["a", "b", "ba", ""],
        ),
        case(
            {
                "allOf": [
                    {"properties": {"a": {"minimum": 2}}},
                    {"properties": {"a": {"type": "integer", "maximum": 4}}},
                ],
                "type": "object",
            },
            [{"a": 2}, {"a": 4}, {}],
            [{"a": 1}, {"a": 5}, {"a": "x"}],
        ),
    ],
    "anyOf": [
        case(
            {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "integer", "minimum": 5}]},
            ["", "ab", 5, 99],
            ["abc", 4, None],
        ),
        case(
            {"anyOf": [{"type": "integer"}, {"minimum": 2.5}], "type": "number"},
            [1, 2.5, 3.75, -4],
            [1.5, -0.5],
        ),
        case(
            {"anyOf": [{"required": ["a"]}, {"required": ["b"]}], "type": "object"},
            [{"a": 1}, {"b": 1}, {"b": 2, "a": 1}],
            [{}, {"c": 1}],
        ),
    ],
    "oneOf": [
        case({"oneOf": [{"type": "integer"}, {"type": "string"}]}, [1, "a"], [None, 1.5, []]),
        case({"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 2}]}, [1, 2.5, -3], [2, 3, 1.5]),
        case(
            CARD,
            [{"kind": "cash", "amount": 1.5}, {"number": "1234", "kind": "card"}, {"kind": "cash"}],
            [{"kind": "card"}, {"kind": "x"}, {}, {"kind": "card", "number": "123"}],
        ),
        case(
            {"oneOf": [{"required": ["a"]}, {"required": ["b"]}], "type": "object"},
            [{"a": 1}, {"b": 1, "c": 2}],
            [{}, {"a": 1, "b": 2}],
        ),
        refused(
            {
                "oneOf": [
                    {"patternProperties": {"^a": {"type": "integer"}}},
                    {"properties": {"b": {"type": "null"}}},
                ],
                "type": "object",
            },
            "/oneOf/0/patternProperties",
            "options that overlap where one has to be negated that can't be (see `not`)",
        ),
    ],
    "not": [
        case({"not": {"type": "integer"}}, [None, 1.5, "a", [], {}], [1, 0, -3]),
        case({"not": {"const": "a"}, "type": "string"}, ["", "b", "aa"], ["a", 1]),
        case({"not": {"enum": [1, 2]}, "type": "integer"}, [0, 3, 12], [1, 2, "a"]),
        case({"not": {"required": ["a"]}, "type": "object"}, [{}, {"b": 1}], [{"a": 1}, {"b": 1, "a": 2}]),
        case(
            {"not": {"properties": {"a": {"type": "integer"}}}},
            [{"a": "x"}, {"b": 1, "a": None}],
            [{}, {"a": 1}, 3],
        ),
        case({"not": {"pattern": "a"}, "type": "string"}, ["", "b"], ["a", "ba"]),
        case(
            {"not": {"anyOf": [{"minimum": 5}, {"type": "string"}]}, "type": ["number", "string"]},
            [4, -1.5],
            [5, "a"],
        ),
        case({"not": {"minItems": 2}, "type": "array"}, [[], [1]], [[1, 2]]),
        case({"not": {"contains": {"const": 1}}, "type": "array"}, [[], [2], ["a", None]], [[1], [2, 1]]),
        case({"not": {"items": {"type": "integer"}}}, [["a"], [1, None]], [[], [1], 1]),
        case({"not": {"not": {"type": "null"}}}, [None], [1, "a"]),
        refused(
            {"not": {"patternProperties": {"a": {"type": "null"}}}},
            "/not/patternProperties",
            "negated `patternProperties`, `additionalProperties`, `propertyNames`, `uniqueItems`,"
            " `multipleOf` other than 1, formats that are cut down, `enum` and `const` of objects and arrays",
        ),
        refused({"not": {"uniqueItems": True}}, "/not/uniqueItems", ""),
        refused({"not": {"const": {"a": 1}}, "type": "object"}, "/not/const", ""),
    ],
    "if, then, else": [
        case(
            {
                "if": {"properties": {"k": {"const": "a"}}, "required": ["k"]},
                "then": {"required": ["x"]},
                "else": {"required": ["y"]},
                "type": "object",
            },
            [{"k": "a", "x": 1}, {"x": 1, "k": "a"}, {"k": "b", "y": 1}, {"y": 2}],
            [{"k": "a"}, {"k": "a", "y": 1}, {"k": "b", "x": 1}, {}],
        ),
        case(
            {"if": {"type": "integer"}, "then": {"minimum": 3}, "type": ["integer", "string"]},
            [3, "a"],
            [2, None],
        ),
        case({"if": {"minLength": 2}, "else": {"const": "z"}, "type": "string"}, ["ab", "z"], ["a", ""]),
    ],
}

NUMBERS: dict[str, list[Case]] = {
    "minimum, maximum": [
        case({"type": "integer", "minimum": -3, "maximum": 12}, [-3, 0, 9, 10, 12], [-4, 13, 100, 1.5]),
        case(
            {"type": "integer", "minimum": 95, "maximum": 1203},
            [95, 99, 100, 999, 1000, 1203],
            [94, 1204, 2000, 9],
        ),
        case({"type": "number", "minimum": 1.5}, [1.5, 1.75, 2, 20.25], [1, 1.25, -2]),
        case(
            {"type": "number", "minimum": -1.25, "maximum": 0.5}, [-1.25, -1, 0, 0.5, 0.125], [0.75, -1.5, 1]
        ),
        case({"minimum": 3}, [3, "a", None], [2]),
    ],
    "exclusiveMinimum, exclusiveMaximum": [
        case({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3}, [1, 2], [0, 3, -1]),
        case(
            {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
            [0.5, 0.001, 0.999],
            [0, 1, -0.5, 1.5],
        ),
        case({"type": "number", "exclusiveMaximum": -2.5}, [-3, -2.75], [-2.5, -2, 0]),
    ],
    "multipleOf": [
        case({"type": "integer", "multipleOf": 5}, [0, 5, -10, 125], [1, 12, 2.5]),
        case({"type": "integer", "multipleOf": 7}, [0, 7, -14, 700], [1, 15, 71]),
        case({"type": "integer", "multipleOf": 3, "minimum": 10, "maximum": 20}, [12, 15, 18], [9, 10, 21]),
        case({"type": "number", "multipleOf": 0.5}, [0, 0.5, 2, -1.5], [0.25, 1.75]),
        case({"type": "number", "multipleOf": 0.25, "maximum": 1}, [0.25, 1, -3.75], [0.3, 1.25]),
        refused(
            {"type": "number", "multipleOf": 0.3},
            "",
            "multiples of a fraction that does not divide a power of ten",
        ),
    ],
}

STRINGS: dict[str, list[Case]] = {
    "minLength, maxLength": [
        case(
            {"type": "string", "minLength": 2},
            ["ab", "abc", "\u00e9\u00e9", "\U0001f600\U0001f600"],
            ["", "a", "\U0001f600"],
        ),
        case({"type": "string", "maxLength": 2}, ["", "ab", '\n"'], ["abc", 1]),
        case(
            {"type": "string", "minLength": 1, "maxLength": 1, "pattern": "[ab]"}, ["a", "b"], ["", "ab", "c"]
        ),
    ],
    "pattern": [
        case({"type": "string", "pattern": "b+"}, ["b", "abba"], ["", "a"]),
        case({"type": "string", "pattern": "^a|z$"}, ["a", "ab", "xz"], ["xa", "zx", ""]),
        case({"type": "string", "pattern": '^[^"\\\\]*$'}, ["", "ab c"], ['a"', "\\"]),
        case({"type": "string", "pattern": "^\\d{3}-\\w+$"}, ["123-ab", "000-_"], ["12-a", "123-"]),
        case({"type": "string", "pattern": "^(?:a|b){2,3}?$"}, ["ab", "bbb"], ["a", "abab"]),
        case({"type": "string", "pattern": "\\u00e9|\\x41"}, ["\u00e9", "xA"], ["a"]),
        case({"type": "string", "pattern": "^\\$\\.$"}, ["$."], ["$"]),
        refused(
            {"type": "string", "pattern": "a(?=b)"},
            "/pattern",
            "lookaround, backreferences, word boundaries, anchors inside of a pattern",
        ),
        refused({"type": "string", "pattern": "(a)\\1"}, "/pattern", ""),
        refused({"type": "string", "pattern": "a^b"}, "/pattern", ""),
    ],
    "format": [
        case(
            {"type": "string", "format": "date"},
            ["2024-02-29", "2023-12-31"],
            ["2023-02-29", "2023-13-01", "23-1-1", ""],
        ),
        case({"type": "string", "format": "time"}, ["12:00:00Z", "23:59:59.5+01:00"], ["25:00:00Z", "12:00"]),
        case(
            {"type": "string", "format": "date-time"},
            ["2024-02-29T12:00:00Z", "2023-01-01T00:00:00.123-05:30"],
            ["2024-02-30T12:00:00Z", "2024-02-29 12:00", "x"],
        ),
        case(
            {"type": "string", "format": "duration"},
            ["P1D", "PT5M", "P1Y2M3DT4H5M6S", "P2W"],
            ["P", "1D", "PT"],
        ),
        case(
            {"type": "string", "format": "uuid"},
            ["123e4567-e89b-12d3-a456-426614174000"],
            ["123e4567e89b12d3a456426614174000", "x"],
        ),
        case(
            {"type": "string", "format": "ipv4"},
            ["0.0.0.0", "192.168.1.255"],
            ["256.1.1.1", "1.2.3", "01.2.3.4"],
        ),
        case(
            {"type": "string", "format": "ipv6"},
            ["::", "::1", "2001:db8::8a2e:370:7334", "1:2:3:4:5:6:7:8", "::ffff:1.2.3.4"],
            ["1::2::3", "12345::", "1:2:3"],
        ),
        case({"type": "string", "format": "email"}, ["a@b.example", "x.y+z@example.com"], ["a", "no at"]),
        case(
            {"type": "string", "format": "hostname"},
            ["example.com", "a-b.example"],
            ["-a.example", "a..b", ""],
        ),
        case(
            {"type": "string", "format": "uri"},
            ["http://example.com/a?b#c", "urn:isbn:123", "mailto:a@b.c"],
            ["no scheme", "//a", ""],
        ),
        case({"type": "string", "format": "uri-reference"}, ["/a/b?c", "http://a", "#x", ""], ["a b", "\\x"]),
        case({"type": "string", "format": "json-pointer"}, ["", "/a/b~0c", "/"], ["a", "/~2"]),
        case({"type": "string", "format": "relative-json-pointer"}, ["0", "1/a", "2#"], ["/a", "01"]),
        refused({"type": "string", "format": "idn-email"}, "/format", "unknown formats"),
    ],
}

ARRAYS_: dict[str, list[Case]] = {
    "items": [
        case({"type": "array", "items": {"type": "integer"}}, [[], [1], [1, 2, 3]], [["a"], [1, None]]),
        case({"type": "array", "items": False}, [[]], [[1], [None]]),
    ],
    "prefixItems": [
        case(
            {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False},
            [[], [1], [1, "a"]],
            [["a"], [1, 2], [1, "a", 3]],
        ),
        case(
            {"type": "array", "prefixItems": [{"const": 1}], "items": {"const": 2}, "minItems": 2},
            [[1, 2], [1, 2, 2]],
            [[1], [2], [1, 1]],
        ),
    ],
    "minItems, maxItems": [
        case({"type": "array", "items": {"type": "integer"}, "minItems": 2}, [[1, 2], [1, 2, 3]], [[], [1]]),
        case(
            {"type": "array", "items": {"type": "null"}, "maxItems": 2},
            [[], [None], [None, None]],
            [[None, None, None]],
        ),
        case({"type": "array", "maxItems": 0}, [[]], [[1]]),
    ],
    "contains, minContains, maxContains": [
        case({"type": "array", "contains": {"const": 1}}, [[1], [2, 1], [1, 1, "a"]], [[], [2], ["1"]]),
        case(
            {"type": "array", "contains": {"type": "integer"}, "minContains": 2},
            [[1, 2], [1, "a", 2, 3]],
            [[1], [1, "a"], []],
        ),
        case(
            {"type": "array", "contains": {"type": "integer"}, "maxContains": 1},
            [[1], ["a", 1, "b"]],
            [[1, 2], ["a"], []],
        ),
        case(
            {"type": "array", "contains": {"const": 1}, "minItems": 2, "maxItems": 3},
            [[1, 2], [2, 2, 1], [1, 1, 1]],
            [[1], [2, 2], [1, 2, 2, 2]],
        ),
        case({"type": "array", "contains": {"const": 1}, "minContains": 0}, [[], [2]], []),
        refused(
            {"prefixItems": [{}], "contains": {"const": 1}},
            "/contains",
            "beside prefixItems, uniqueItems or another contains",
        ),
    ],
    "uniqueItems": [
        case(
            {"type": "array", "items": {"enum": ["a", "b", 1]}, "uniqueItems": True},
            [[], ["b"], ["b", "a"], [1, "a", "b"]],
            [["a", "a"], [1, "b", 1], ["c"]],
        ),
        case(
            {
                "type": "array",
                "items": {"type": "integer", "minimum": 1, "maximum": 9},
                "uniqueItems": True,
                "minItems": 2,
                "maxItems": 3,
            },
            [[1, 2], [9, 1, 5]],
            [[1], [1, 1], [1, 2, 3, 4]],
        ),
        case({"type": "array", "uniqueItems": True, "maxItems": 1}, [[], [1]], [[1, 1]]),
        refused(
            {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
            "/uniqueItems",
            "over items of which there are more than 48 values",
        ),
    ],
    "unevaluatedItems": [
        case(
            {"type": "array", "prefixItems": [{"type": "integer"}], "unevaluatedItems": False},
            [[], [1]],
            [["a"], [1, 2]],
        ),
        case(
            {
                "type": "array",
                "allOf": [{"prefixItems": [{"type": "integer"}]}],
                "unevaluatedItems": {"type": "string"},
            },
            [[1, "a"], []],
            [[1, 2], ["a"]],
        ),
        refused(
            {"contains": {"const": 1}, "unevaluatedItems": False}, "/unevaluatedItems", "beside contains"
        ),
    ],
}

AB = {"a": {"type": "integer"}, "b": {"type": "string"}}
OBJECTS_: dict[str, list[Case]] = {
    "properties, required": [
        case(
            {"type": "object", "properties": AB, "required": ["a"]},
            [{"a": 1}, {"a": 1, "b": ""}, {"b": "", "a": 1}, {"c": None, "a": 2}],
            [{}, {"b": "x"}, {"a": "x"}, {"a": 1, "b": 2}],
        ),
        case(
            {"type": "object", "required": ["x", "y"]},
            [{"x": 1, "y": 2}, {"y": 1, "x": []}, {"z": 0, "y": 1, "x": 2}],
            [{}, {"x": 1}, {"y": 2, "z": 1}],
        ),
        case({"type": "object", "properties": {"a": False}}, [{}, {"b": 1}], [{"a": 1}]),
        case(
            {"type": "object", "properties": {'k\u00e9"\n': {"const": 1}}, "required": ['k\u00e9"\n']},
            [{'k\u00e9"\n': 1}],
            [{"k": 1}, {}],
        ),
    ],
    "additionalProperties": [
        case(
            {"type": "object", "properties": AB, "additionalProperties": False},
            [{}, {"b": "x", "a": 1}],
            [{"c": 1}, {"a": 1, "c": 1}],
        ),
        case(
            {"type": "object", "properties": AB, "additionalProperties": {"type": "null"}},
            [{"c": None}, {"a": 1, "d": None}],
            [{"c": 1}, {"a": None}],
        ),
        case(
            {"type": "object", "additionalProperties": {"type": "integer"}},
            [{}, {"x": 1, "": 2}],
            [{"x": "a"}],
        ),
    ],
    "patternProperties": [
        case(
            {"type": "object", "patternProperties": {"^n": {"type": "integer"}}},
            [{"n": 1}, {"x": "a", "nn": 2}, {}],
            [{"n": "a"}, {"nx": None}],
        ),
        case(
            {
                "type": "object",
                "patternProperties": {"^n": {"type": "integer"}, "s$": {"minimum": 5}},
                "additionalProperties": False,
            },
            [{"n": 1}, {"ns": 5}, {"xs": "a"}],
            [{"ns": 4}, {"x": 1}, {"ns": "a"}],
        ),
        case(
            {
                "type": "object",
                "properties": {"nx": {"maximum": 3}},
                "patternProperties": {"^n": {"type": "integer"}},
            },
            [{"nx": 3}, {"ny": 4}],
            [{"nx": 4}, {"nx": "a"}],
        ),
    ],
    "propertyNames": [
        case(
            {"type": "object", "propertyNames": {"pattern": "^[ab]+$"}},
            [{}, {"a": 1, "ab": 2}],
            [{"c": 1}, {"": 1}],
        ),
        case(
            {"type": "object", "propertyNames": {"enum": ["x", "y"]}, "required": ["x"]},
            [{"x": 1}, {"y": 2, "x": 1}],
            [{"y": 1}, {"x": 1, "z": 2}],
        ),
        case(
            {"type": "object", "propertyNames": {"maxLength": 2}, "properties": {"abc": {}}},
            [{"ab": 1}, {}],
            [{"abc": 1}],
        ),
    ],
    "minProperties, maxProperties": [
        case({"type": "object", "minProperties": 1}, [{"a": 1}, {"x": 1, "y": 2}], [{}]),
        case({"type": "object", "maxProperties": 1}, [{}, {"a": 1}], [{"a": 1, "b": 2}]),
        case(
            {
                "type": "object",
                "properties": {"a": {}, "b": {}, "c": {}},
                "additionalProperties": False,
                "minProperties": 2,
            },
            [{"a": 1, "c": 2}, {"c": 1, "b": 2, "a": 3}],
            [{}, {"a": 1}],
        ),
        case(
            {"type": "object", "properties": {"a": {}, "b": {}}, "required": ["a"], "maxProperties": 2},
            [{"a": 1}, {"b": 1, "a": 1}, {"x": 0, "a": 1}],
            [{"b": 1}, {"a": 1, "b": 2, "c": 3}, {"x": 1, "y": 2}],
        ),
        refused(
            {"type": "object", "minProperties": 2},
            "/minProperties",
            "more than one property beyond the named ones, whose names could be equal",
        ),
    ],
    "dependentRequired": [
        case(
            {"type": "object", "properties": AB, "dependentRequired": {"a": ["b"]}},
            [{}, {"b": "x"}, {"a": 1, "b": "x"}, {"b": "", "a": 1}],
            [{"a": 1}],
        ),
        case(
            {"type": "object", "dependentRequired": {"x": ["y"], "y": ["z"]}},
            [{"z": 1}, {"x": 1, "y": 1, "z": 1}, {"y": 1, "z": 1}],
            [{"x": 1}, {"x": 1, "y": 1}, {"y": 2}],
        ),
        case(
            {"type": "object", "dependentRequired": {"a": ["b"]}, "required": ["a"]},
            [{"a": 1, "b": 2}],
            [{"a": 1}, {}],
        ),
    ],
    "dependentSchemas": [
        case(
            {
                "type": "object",
                "dependentSchemas": {"a": {"properties": {"b": {"type": "integer"}}, "required": ["b"]}},
            },
            [{}, {"b": "x"}, {"a": 1, "b": 2}],
            [{"a": 1}, {"a": 1, "b": "x"}],
        ),
    ],
    "unevaluatedProperties": [
        case(
            {
                "type": "object",
                "allOf": [{"properties": {"a": {}}}],
                "properties": {"b": {}},
                "unevaluatedProperties": False,
            },
            [{}, {"a": 1}, {"b": 1, "a": 2}],
            [{"c": 1}],
        ),
        case(
            {
                "type": "object",
                "anyOf": [
                    {"properties": {"a": {}}, "required": ["a"]},
                    {"properties": {"b": {}}, "required": ["b"]},
                ],
                "unevaluatedProperties": False,
            },
            [{"a": 1}, {"b": 1}, {"a": 1, "b": 2}],
            [{}, {"a": 1, "c": 1}],
        ),
        case(
            {
                "type": "object",
                "$ref": "#/$defs/x",
                "unevaluatedProperties": {"type": "null"},
                "$defs": {"x": {"properties": {"a": {"type": "integer"}}}},
            },
            [{"a": 1}, {"b": None}],
            [{"a": None}, {"b": 1}],
        ),
    ],
}

ANNOTATED = case(
    {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://example.com/s",
        "title": "t",
        "description": "d",
        "default": 1,
        "examples": [2],
        "$comment": "c",
        "deprecated": False,
        "readOnly": True,
        "writeOnly": False,
        "contentEncoding": "base64",
        "discriminator": {"propertyName": "kind"},
        "externalDocs": {"url": "https://example.com"},
        "xml": {"name": "n"},
        "x-own": 1,
        "type": "integer",
    },
    [1],
    ["a"],
)


def tables() -> dict[str, dict[str, list[Case]]]:
    """Cases by group and keyword."""
    return {
        "General": GENERAL,
        "Numbers": NUMBERS,
        "Strings": STRINGS,
        "Arrays": ARRAYS_,
        "Objects": OBJECTS_,
    }


def keyword_table() -> str:
    """The section of docs/structured-output.md: how each keyword is honoured."""
    lines = ["| keyword | honoured | refused |", "|---|---|---|"]
    for group, keywords in tables().items():
        lines.append(f"| **{group}** | | |")
        for keyword, cases in keywords.items():
            pairs = sum(len(one.valid) + len(one.invalid) for one in cases)
            notes = "; ".join(one.note for one in cases if one.note)
            name = ", ".join(f"`{word}`" for word in keyword.split(", "))
            lines.append(f"| {name} | exact ({pairs} pairs tested) | {notes or 'nothing'} |")
    words = ", ".join(f"`{word}`" for word in ANNOTATED.schema if word not in ("type", "x-own"))
    lines.append(f"| {words}, `x-...` | annotation: bounds nothing | |")
    return "\n".join(lines) + "\n"
