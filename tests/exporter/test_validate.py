"""What decides `passed`: NaN always fails, a floor is kept to, and what cannot matter is let pass."""

from __future__ import annotations

import math

import pytest
import torch

from exporter.checks import check, under
from exporter.metrics import finite, sqnr_db
from exporter.validate import lowering_rows


def row(sqnr, floor, dtype="fp16"):
    return {"sqnr_db": sqnr, "floor_db": floor, "dtype": dtype}


@pytest.mark.parametrize(
    ("sqnr", "floor", "dtype", "quantization", "passes"),
    [
        (47.1, 50.0, "fp32", 40.0, True),  # within the margin
        (46.9, 50.0, "fp32", 40.0, False),  # beyond it
        (61.0, 140.0, "fp32", 40.0, True),  # a flipped code, 21 dB below the quantization error
        (59.0, 140.0, "fp32", 40.0, False),  # not as far below it
        (121.0, 138.0, "fp32", None, True),  # two orders of summation in fp32
        (119.0, 138.0, "fp32", None, False),
        (121.0, 138.0, "fp16", None, False),  # of no meaning for fp16
        (None, None, "fp32", None, True),  # equal bit for bit
        (50.0, None, "fp16", None, False),  # a floor of equal models leaves no room
    ],
)
def test_an_engine_keeps_to_its_floor_or_to_what_cannot_matter(sqnr, floor, dtype, quantization, passes):
    assert check("lowering", under(row(sqnr, floor, dtype), quantization), "dB", 3.0)["passed"] == passes


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_engine_that_gives_nan_or_infinity_is_counted_and_cannot_pass(bad, monkeypatch):
    class Broken:
        name = "broken"

        def run(self, feeds):
            return {"sample": torch.tensor([[1.0, bad]]).numpy()}

    reference = {
        "0/feeds/x": torch.zeros(1, 1),
        "0/quantized": torch.ones(1, 2),
        "0/quantized_fp64": torch.full((1, 2), 1.001),
    }
    engine = type("Engine", (), {"info": {"dtype": "fp32", "graph": {"step_input": None}}})
    (found,) = lowering_rows(Broken(), engine, reference)
    assert found["not_finite"] == 1
    assert found["sqnr_db"] is None
    assert finite(sqnr_db(torch.ones(2), torch.tensor([1.0, bad]))) is None


def test_a_value_that_is_no_number_fails_its_check():
    assert not check("x", math.nan, "", 1.0)["passed"]
    assert not check("x", math.inf, "", 1.0)["passed"]


def test_an_engine_that_is_told_the_step_is_judged_on_rows_of_all_steps_mixed():
    seen = []

    class Engine:
        name = "ort"

        def run(self, feeds):
            seen.append(feeds["step"].tolist())
            return {"sample": feeds["x"] * (1.0 + feeds["step"][:, None])}

    reference = {}
    for step in (0, 4):
        x = torch.arange(3.0)[:, None] + 10 * step + 1
        reference |= {f"{step}/feeds/x": x, f"{step}/feeds/step": torch.full((3,), step)}
        reference |= {f"{step}/quantized": x * (1 + step), f"{step}/quantized_fp64": x * (1 + step) * (1 + 1e-6)}
    engine = type("Engine", (), {"info": {"dtype": "fp32", "graph": {"step_input": "index"}}})
    rows = lowering_rows(Engine(), engine, reference, rows=4)
    assert seen == [[0, 4, 0, 4], [0, 4]]
    assert [(row["step"], row["max_abs"]) for row in rows] == [(0, 0.0), (4, 0.0)]
