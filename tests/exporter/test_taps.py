"""Where errors start: the first layer past the floor of its own rounding, or that gives NaN; all of one fixed share."""

from __future__ import annotations

import math

import torch

from exporter.taps import ELEMENTS, compared, origin, seen


def rows(*values, bad=()):
    return [
        {"runner": "ort", "layer": f"layer {i}", "step": 0, "sqnr_db": value, "not_finite": int(i in bad)}
        for i, value in enumerate(values)
    ]


def test_the_first_layer_past_the_threshold_is_where_an_error_starts():
    found = origin(rows(130.0, 40.0, 5.0), rows(140.0, 80.0, 80.0))
    assert (found["layer"], found["floor_db"]) == ("layer 1", 80.0)


def test_a_layer_at_its_floor_is_no_origin_however_low_that_is():
    assert origin(rows(130.0, 25.0, None), rows(140.0, 30.0, None)) is None
    assert origin(rows(70.0), rows(140.0)) is None  # two orders of summation, in fp16 as well


def test_nan_is_where_it_arises_and_not_behind():
    assert origin(rows(None, 50.0, None, bad=(1, 2)), rows(None, 50.0, 50.0))["layer"] == "layer 1"


def test_equal_layers_have_no_number_and_a_floor_without_error_leaves_room_for_fp16():
    assert origin(rows(None), rows(None)) is None
    assert origin(rows(59.0), rows(None))["layer"] == "layer 0"


def test_the_same_elements_are_kept_of_what_is_alike_and_nan_is_counted_in_all():
    x = torch.randn(3, ELEMENTS)
    x[2, 5] = math.nan
    first, second = seen(x), seen(x + 1)
    assert len(first.values) == ELEMENTS
    assert first.not_finite == 1
    assert torch.allclose(first.values.nan_to_num() + 1, second.values.nan_to_num(nan=1.0))


def test_rows_come_in_the_order_that_layers_ran_and_for_those_both_have():
    ours = {(0, "b"): seen(torch.ones(4)), (0, "a"): seen(torch.ones(4)), (0, "float only"): seen(torch.ones(4))}
    theirs = {(0, "a"): seen(torch.ones(4)), (0, "b"): seen(torch.full((4,), 1.1))}
    found = compared("ort", ours, theirs)
    assert [(row["layer"], row["sqnr_db"] and round(row["sqnr_db"])) for row in found] == [("b", 20), ("a", None)]
