"""The keyword table: each schema with its valid and invalid values, against the jsonschema package."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from tests.pure.grammar.cases import ANNOTATED, Case, tables
from tests.pure.grammar.support import accepts, compile_
from trunkline.grammar.protocol import GrammarError

CASES = tuple(
    pytest.param(one, id=f"{keyword.split(',')[0]}-{index}")
    for keywords in tables().values()
    for keyword, cases in keywords.items()
    for index, one in enumerate(cases)
)
CHECKER = jsonschema.Draft202012Validator.FORMAT_CHECKER


def is_valid(schema: Any, value: Any) -> bool:
    return jsonschema.Draft202012Validator(schema, format_checker=CHECKER).is_valid(value)


@pytest.mark.parametrize("one", [*CASES, pytest.param(ANNOTATED, id="annotations")])
def test_accepts_exactly_the_valid_values(one: Case) -> None:
    if one.refused is not None:
        with pytest.raises(GrammarError) as caught:
            compile_("json_schema", one.schema)
        assert (caught.value.code, caught.value.pointer) == ("unsupported_grammar", one.refused)
        return
    grammar = compile_("json_schema", one.schema)
    for value in one.valid:
        assert is_valid(one.schema, value), value
        assert accepts(grammar, json.dumps(value, ensure_ascii=False)), value
        assert accepts(grammar, json.dumps(value, ensure_ascii=False, separators=(",", ":"))), value
    for value in one.invalid:
        assert not is_valid(one.schema, value), value
        assert not accepts(grammar, json.dumps(value, ensure_ascii=False)), value


def test_there_are_enough_pairs() -> None:
    cases = [one for keywords in tables().values() for found in keywords.values() for one in found]
    assert sum(len(one.valid) + len(one.invalid) for one in cases) >= 400


def test_every_value_of_the_table_against_every_schema() -> None:
    """Nothing invalid is accepted, whatever keyword it was written for."""
    cases = [one for keywords in tables().values() for found in keywords.values() for one in found]
    values = {json.dumps(value): value for one in cases for value in (*one.valid, *one.invalid)}
    wrong = []
    for one in cases:
        if one.refused is None:
            grammar = compile_("json_schema", one.schema)
            wrong += [
                (one.schema, value)
                for value in list(values.values())[::5]
                if accepts(grammar, json.dumps(value, ensure_ascii=False)) and not is_valid(one.schema, value)
            ]
    assert wrong == []
