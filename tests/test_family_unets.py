"""U-Nets on the main road: calibrated, quantized, lowered, built; engines agree and run as was asked."""

from __future__ import annotations

from functools import cache

import pytest
from common import RECIPES
from road import assert_goes_the_whole_road, calibrated

NAMES = ("unet", "sd", "sdxl")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Returns a family's model and calibration, made when first asked for."""
    return cache(lambda name: calibrated(name, tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_family_goes_the_whole_road(name, recipe, made, tmp_path):
    assert_goes_the_whole_road(*made(name), recipe, tmp_path)
