"""The capability table: the page, the start-up check and the matrix come from it (P18)."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline.config.compat import (
    EXCLUSIONS,
    FEATURES,
    capability_table_markdown,
    check_compatible,
    matrix_axes,
    pairwise,
)
from trunkline.config.flags import Args, flags_of, spelling
from trunkline.config.reference import refused_flags
from trunkline.config.schema import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from trunkline.types import RequestError

PAGE = Path(__file__).parents[2] / "docs" / "capabilities.md"


def test_the_page_is_made_from_the_table() -> None:
    made = capability_table_markdown()
    assert PAGE.read_text() == made, "run `make docs`"
    for feature in FEATURES:
        assert feature.name in made and feature.how in made


def test_flags_of_built_features_exist_and_those_of_planned_ones_are_refused() -> None:
    ours = {spelling(name) for name in flags_of(Args)}
    for feature in FEATURES:
        for word in feature.how.replace(";", " ").replace(",", " ").split():
            if word.startswith("--"):
                known = (
                    ours
                    if feature.status == "built"
                    else refused_flags().keys() | {"--tp-size", "--disaggregation-mode"}
                )
                assert word in known, feature


def test_the_start_up_check_names_what_clashes() -> None:
    good = EngineConfig(model=ModelConfig(path="x"))
    check_compatible(good)
    bad = {
        "steps smaller than the batch": {"scheduler": SchedulerConfig(max_running=9, step_tokens=8)},
        "a context longer than the KV pool": {"cache": CacheConfig(num_pages=2)},
        "waiting for a prefix without a prefix cache": {"cache": CacheConfig(prefix_cache=False)},
    }
    assert set(bad) == {exclusion.name for exclusion in EXCLUSIONS}
    for name, change in bad.items():
        with pytest.raises(RequestError, match=name) as caught:
            check_compatible(msgspec.structs.replace(good, **change))
        assert caught.value.code == "incompatible"


def pairs(row: dict[str, object]) -> set[tuple[object, object]]:
    return set(combinations(row.items(), 2))


def test_the_matrix_covers_every_pair_in_few_rows() -> None:
    axes = matrix_axes()
    assert set(axes) == {
        "prefix_cache",
        "page_size",
        "kv_cache_dtype",
        "step_tokens",
        "mix",
        "depth",
        "batch",
        "pool",
        "jump_forward",
        "policy",
    }
    rows = pairwise(axes)
    assert rows == pairwise(axes)
    assert len(rows) < 20
    for row in rows:
        assert list(row) == list(axes) and all(row[name] in axes[name] for name in axes)


@given(st.lists(st.integers(1, 4), min_size=2, max_size=6))
def test_any_covering_array_covers(sizes: list[int]) -> None:
    axes = {f"axis{i}": tuple(range(size)) for i, size in enumerate(sizes)}
    rows = pairwise(axes)
    wanted = {((a, x), (b, y)) for a, b in combinations(axes, 2) for x in axes[a] for y in axes[b]}
    assert set().union(*(pairs(row) for row in rows)) == wanted
    assert len(rows) <= len(wanted)
