"""Proof that the simulation can fail: every planted bug is caught."""

from __future__ import annotations

from typing import Any

import pytest

from tests.sim.cases import make_case
from tests.sim.mutations import MUTATIONS, Mutation, StaleMutation, catch, planted
from tests.sim.runner import run_case
from trunkline.cache import PrefixCache
from trunkline.scheduler.scheduler import Scheduler

MOST_CASES = 1500  # most bugs show within 50


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_planted_bug_is_caught(mutation: Mutation) -> None:
    found = catch(mutation, MOST_CASES)
    assert found is not None, f"{mutation.bug}: {MOST_CASES} cases passed with it"
    assert found[1], "what caught it is not said"


def test_names_are_unique_and_bugs_are_taken_out_again() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 12
    before = dict(vars(Scheduler)), dict(vars(PrefixCache))
    with planted(MUTATIONS[0]):
        pass
    assert before == (dict(vars(Scheduler)), dict(vars(PrefixCache)))
    run_case(make_case(0))


def test_a_mutation_without_a_target_fails_loudly() -> None:
    gone = Mutation("gone", "-", ((Scheduler, "no_such_method"),), lambda original: None)
    with pytest.raises(StaleMutation, match="no_such_method does not exist"):
        catch(gone, 1)


def test_a_wrapper_that_no_longer_fits_fails_loudly() -> None:
    def wrapper(original: object, self: Any) -> None:
        self.no_such_attribute  # noqa: B018

    with pytest.raises(StaleMutation, match="no_such_attribute"):
        catch(Mutation("unfit", "-", ((Scheduler, "schedule"),), wrapper), 1)
