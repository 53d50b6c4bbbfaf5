"""U-Nets on the main road: calibrated, quantized, lowered, built; engines agree and run as was asked."""

from __future__ import annotations

import pytest
from road import assert_goes_the_whole_road

# Every family, and every recipe with convolutions, and beside text: what a recipe does to a layer is the same in each.
CASES = [("unet", "fp8"), ("unet", "int8"), ("unet", "int4"), ("sd", "fp8"), ("sd", "int4"), ("sdxl", "int8")]


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_a_family_goes_the_whole_road(name, recipe, calibrated_family, tmp_path):
    assert_goes_the_whole_road(*calibrated_family(name), recipe, tmp_path)
