"""Charts: every point lies inside its drawing, where its ticks say."""

from __future__ import annotations

import re

import pytest

from exporter import charts


@pytest.mark.parametrize("values", [[0.0, 1.0], [-3.2, 7.9], [48.1], [1e-4, 2e-4], [26.2, 131.7], []])
def test_round_ticks_enclose_the_values(values):
    axis = charts.axis(values, 10, 110)
    assert axis.ticks[0] <= min(values, default=0.0)
    assert max(values, default=1.0) <= axis.ticks[-1]
    assert 2 <= len(axis.ticks) <= charts.TICKS + 2
    assert (axis.marks()[0][0], axis.marks()[-1][0]) == (10, 110)


def test_an_axis_is_linear_and_ends_at_its_ends():
    axis = charts.Axis([0.0, 5.0, 10.0], 200, 0)
    assert [axis.at(value) for value in (0, 2.5, 10, 12, -1)] == [200, 150, 0, 0, 200]


def test_what_has_no_number_is_no_point_of_a_line():
    chart = charts.lines({"ort": [(0, 40.0), (12, None), (24, 30.0)], "quantized": [(0, None)]}, "step", "dB")
    ort, quantized = chart["lines"]
    assert [text for *_, text in ort["dots"]] == ["ort, step 0: 40.0", "ort, step 24: 30.0"]
    assert ort["path"].count("L") == 1
    assert (quantized["path"], quantized["dots"]) == ("", [])


def test_nothing_to_draw_is_no_chart():
    assert charts.lines({"ort": [(0, None)]}, "step", "dB") is None
    assert charts.scatter([], "MB", "dB") is None


def test_a_scattered_point_and_its_interval_lie_inside():
    point = {
        "name": "fp8",
        "number": 1,
        "here": True,
        "x": 4.8,
        "x_span": (4.0, 6.1),
        "y": 48.1,
        "y_span": (47.7, 48.5),
    }
    (drawn,) = (chart := charts.scatter([point], "MB", "dB"))["points"]
    assert chart["left"] <= drawn["across"][0] < drawn["x"] < drawn["across"][1] <= chart["right"]
    assert chart["top"] <= drawn["along"][1] < drawn["y"] < drawn["along"][0] <= chart["bottom"]


def test_bars_grow_by_decades_and_a_single_value_is_seen():
    chart = charts.histogram([-1.0, 0.0, 1.0, 2.0], [1, 10, 0], [0, 0, 1000], [], "weight")
    heights = [float(y) for y in re.findall(r"V([\d.]+)", chart["filled"])]
    ground = chart["bottom"]
    one, ten, none, _ = (ground - y for y in heights)
    assert none == 0
    assert one > 3
    decade = chart["y_marks"][0][0] - chart["y_marks"][1][0]
    assert ten - one == pytest.approx(decade, abs=0.2)
    assert [label for _, label in chart["y_marks"]] == ["1", "10", "100", "1,000"]
    assert "range" not in chart


def test_a_range_is_drawn_on_both_sides_from_its_least_to_its_largest():
    chart = charts.histogram([-4.0, 0.0, 4.0], [5, 100_000], [], [2.0, 1.0, 3.0], "input")
    (low_near, low_far), (high_near, high_far) = chart["range"]
    assert low_far < low_near < high_near < high_far
    assert chart["outlined"] == ""
    assert chart["y_marks"][-1][1] == "10⁵"
