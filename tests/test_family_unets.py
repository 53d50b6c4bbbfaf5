"""U-Nets on the main road: calibrated, quantized, lowered, built; engines agree and run as was asked."""

from __future__ import annotations

import pytest
from common import RECIPES
from road import assert_goes_the_whole_road

NAMES = ("unet", "sd", "sdxl")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_family_goes_the_whole_road(name, recipe, calibrated_family, tmp_path):
    assert_goes_the_whole_road(*calibrated_family(name), recipe, tmp_path)
