"""What check_bundles says of samples that several runtimes drew."""

from __future__ import annotations

import check_bundles
import numpy as np
import pytest

ONE = np.random.default_rng(0).standard_normal((2, 1, 4, 4)).astype(np.float32)


def with_nan(count):
    found = ONE.copy()
    found.reshape(-1)[:count] = np.nan
    return found


def test_the_least_of_all_pairs_is_told():
    assert check_bundles.least_db([ONE, ONE.copy(), ONE], 2.0) == np.inf
    assert check_bundles.least_db([ONE, ONE + 0.2, ONE + 0.002], 2.0) == pytest.approx(20.0, abs=0.2)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("bad", [with_nan(1), with_nan(ONE.size), np.full_like(ONE, np.inf), ONE[:1], ONE[0]])
def test_a_runtime_whose_samples_are_no_numbers_or_of_another_shape_is_no_match(bad, place):
    drawn = [ONE, ONE + 0.002]
    drawn.insert(place, bad)
    least = check_bundles.least_db(drawn, 2.0)
    assert least == -np.inf
    assert check_bundles.told(least) == "not finite"


def test_equality_is_told_in_words():
    assert check_bundles.told(np.inf) == "equal"
    assert check_bundles.spelled("equal") == "equal"
    assert check_bundles.spelled(41.25) == "41.2 dB"
