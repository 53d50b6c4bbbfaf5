"""Transformers on the main road: calibrated, quantized, lowered, built; engines agree and run as was asked."""

from __future__ import annotations

import pytest
from common import FAMILIES
from families import family
from road import assert_goes_the_whole_road

NAMES = ("pixart-alpha", "sd35", "flux-dev")  # the graphs of the others are parts of these
# Every family, and every recipe on blocks of one stream and of two that attend jointly.
CASES = [("pixart-alpha", "fp8"), ("pixart-alpha", "int8"), ("pixart-alpha", "int4")]
CASES += [("sd35", "int8"), ("sd35", "int4"), ("flux-dev", "fp8")]


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_a_family_goes_the_whole_road(name, recipe, calibrated_family, tmp_path):
    assert_goes_the_whole_road(*calibrated_family(name), recipe, tmp_path)


def test_the_families_that_are_left_out_have_no_layer_of_their_own():
    """Every kind of module that they have is in a family that goes the road."""

    def kinds(name):
        return {type(module) for module in family(name).build().modules()}

    assert {name for name, _ in CASES} == set(NAMES)
    tried = set().union(*map(kinds, NAMES))
    for left_out in ("pixart-sigma", "sd3", "flux-schnell"):
        assert kinds(left_out) <= tried, left_out
    assert FAMILIES.keys() == {*NAMES, "unet", "sd", "sdxl", "pixart-sigma", "sd3", "flux-schnell"}
