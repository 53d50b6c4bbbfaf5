"""JSON from outside is held against a shape before anything of it is used."""

from __future__ import annotations

import pytest

from engines.shape import NUMBER, Each, Maybe, fault

SHAPE = {"name": str, "sizes": Each(int, list), "scale": Maybe(NUMBER), "by": Each({"n": int}, dict)}
GOOD = {"name": "a", "sizes": [1, 2], "scale": None, "by": {"x": {"n": 1}}, "more": object()}


def test_a_value_of_the_shape_has_no_fault_and_may_hold_more():
    assert fault(GOOD, SHAPE, "info") is None
    assert fault({**GOOD, "scale": 1.5}, SHAPE, "info") is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": 1}, "info.name is a int, not str"),
        ({"sizes": "12"}, "info.sizes is no list"),
        ({"sizes": [1, "2"]}, "info.sizes.1 is a str, not int"),
        ({"sizes": [True]}, "info.sizes.0 is a bool, not int"),
        ({"scale": "1"}, "info.scale is a str, not int or float"),
        ({"by": []}, "info.by is no object"),
        ({"by": {"x": {}}}, "info.by.x lacks 'n'"),
        ({"by": {"x": [1]}}, "info.by.x is no object"),
    ],
)
def test_a_fault_is_named_with_its_place(change, told):
    assert fault({**GOOD, **change}, SHAPE, "info") == told


def test_a_missing_key_is_named():
    assert fault({"name": "a"}, SHAPE, "info") == "info lacks 'by'"
