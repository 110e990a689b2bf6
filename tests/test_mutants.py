"""The list of faults of mutants.py fits the sources; `make mutants` checks that the tests find them."""

import mutants
import pytest
from planted import MUTANTS

pytestmark = pytest.mark.skipif(
    not (mutants.ROOT / "setup.py").exists(), reason="there is no checkout around the tests"
)


def test_every_fault_fits_exactly_one_place() -> None:
    assert not mutants.problems(MUTANTS)


def test_a_fault_that_does_not_fit_is_named() -> None:
    good = MUTANTS[0]
    for bad in (good._replace(text="not in the file"), good._replace(text="e"), good._replace(replacement=good.text)):
        (problem,) = mutants.problems([bad])
        assert problem.startswith(good.name)
    assert len(mutants.problems([good, good])) == 1
