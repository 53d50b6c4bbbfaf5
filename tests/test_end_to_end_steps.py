"""The main road with a scale for every step, on a trained model: engines at their floor, rows of all steps mixed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from road import assert_multiplies_in_int8, untrained
from safetensors.torch import load_file

from engines.build import build
from engines.plans import read_plan
from exporter import quantized
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.checks import FLOOR_MARGIN_DB, under
from exporter.layers import compare_layers
from exporter.lower import lower
from exporter.quantize import quantize
from exporter.run_folder import Run
from exporter.validate import lowering_rows, open_runners

SAME_CODES = 0.999  # of a layer, on the same inputs: the project's bar


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    checkpoint = open_checkpoint("digits-dit")
    return checkpoint, calibrate(checkpoint, tmp_path_factory.mktemp("digits") / "calibration", samples=8)


def test_w4a8_agrees_on_mixed_steps_and_multiplies_int8(digits, tmp_path):
    checkpoint, calibration = digits
    source = quantize(checkpoint, untrained("dilate-w4a8"), calibration, tmp_path / "quantized")
    graph = lower(source, tmp_path / "graph" / "fp32", dtype="fp32")
    run = Run(source, {"fp32": graph}, {"ort": build(graph, "ort", tmp_path / "engines" / "ort")})
    reference = load_file(source.file(quantized.REFERENCE))
    rows = lowering_rows(open_runners(run)[0]["ort"], run.engines["ort"], reference)
    assert len(rows) == 5
    for row in rows:
        assert under(row, None) <= FLOOR_MARGIN_DB, row
    for row in compare_layers(replace(run, engines={})):
        assert row["codes"] == 0 or row["codes_different"] <= 1 - SAME_CODES, row

    half = lower(source, tmp_path / "graph" / "fp16", dtype="fp16")
    plan = read_plan(build(half, "trt-rtx", tmp_path / "engines" / "trt-rtx", gpu="sm89"))
    stepped = {path for path, spec in quantized.specs(source).items() if spec.steps}
    assert len(stepped) == 42
    assert_multiplies_in_int8(plan, stepped, quantized.points(source))
    held = sum(row.constant_bytes for row in plan if "int4" in row.constant_types)
    codes = sum(
        layer.weight_codes.numel()
        for path, layer in quantized.quantized_layers(quantized.load(source)).items()
        if path in stepped
    )
    assert codes / 2 <= held <= 1.05 * codes / 2  # two codes to a byte, and scales beside them
