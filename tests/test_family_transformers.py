"""Transformers on the main road: calibrated, quantized, lowered, built; engines agree and run as was asked."""

from __future__ import annotations

import pytest
from common import FAMILIES, RECIPES
from families import family
from road import assert_goes_the_whole_road

NAMES = ("pixart-alpha", "sd35", "flux-dev")  # the graphs of the others are parts of these


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_family_goes_the_whole_road(name, recipe, calibrated_family, tmp_path):
    assert_goes_the_whole_road(*calibrated_family(name), recipe, tmp_path)


def test_the_families_that_are_left_out_have_no_layer_of_their_own():
    """Every kind of module that they have is in a family that goes the road."""

    def kinds(name):
        return {type(module) for module in family(name).build().modules()}

    tried = set().union(*map(kinds, NAMES))
    for left_out in ("pixart-sigma", "sd3", "flux-schnell"):
        assert kinds(left_out) <= tried, left_out
    assert FAMILIES.keys() == {*NAMES, "unet", "sd", "sdxl", "pixart-sigma", "sd3", "flux-schnell"}
