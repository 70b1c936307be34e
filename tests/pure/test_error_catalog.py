"""Every error code has a cause and a fix, and the catalog has no others (P17)."""

from __future__ import annotations

from tools.check.source import Source, read_sources
from tools.errors import codes_in, error_catalog, mismatches
from tools.setup_env import ROOT
from trunkline.config.errors import ERRORS, Known

PLANTED = """
raise RequestError("x", code="planted_one", status=418)
raise ModelError("x", "planted_two")
fail(code="planted_three" if a else b or "planted_four")
"""


def test_all_ways_to_give_a_code_are_seen() -> None:
    found = codes_in([Source("src/trunkline/planted.py", PLANTED)])
    assert {code: {status for _, status in places} for code, places in found.items()} == {
        "planted_one": {418},
        "planted_two": {400},
        "planted_three": {400},
        "planted_four": {400},
    }


def test_a_code_without_entry_and_an_entry_without_use_are_found() -> None:
    table = {"planted_one": Known("a", "b"), "gone": Known("a", "b")}
    assert mismatches({"planted_one": 1, "planted_two": 1}, table) == [
        "nothing uses the error code gone of trunkline/config/errors.py",
        "the error code planted_two has no entry in trunkline/config/errors.py",
    ]


def test_the_catalog_is_whole() -> None:
    sources = read_sources(ROOT)
    assert len(codes_in(sources)) > 80 and not mismatches(codes_in(sources))
    page = error_catalog(sources)
    for code, known in ERRORS.items():
        assert f"| `{code}` |" in page
        assert len(known.cause) > 10 and len(known.fix) > 4 and "|" not in known.cause + known.fix
