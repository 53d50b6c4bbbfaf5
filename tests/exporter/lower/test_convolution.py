"""Quantized convolutions compile to quantized convolutions, and agree with PyTorch layer by layer."""

from __future__ import annotations

import json

import pytest
from common import TINY

from engines.build import build
from engines.plans import read_plan
from exporter import recipe as recipes
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.layers import compare_layers
from exporter.lower import lower
from exporter.quantize import quantize
from exporter.run_folder import Run

INT8 = {"format": "int", "bits": 8}
FP8 = {"format": "fp", "exponent_bits": 4, "mantissa_bits": 3}


@pytest.fixture(scope="module")
def wide_input(tmp_path_factory):
    """A tiny random DiT whose patch convolution has 32 inputs: TensorRT has no FP8 convolution under 16 channels."""
    folder = tmp_path_factory.mktemp("wide")
    (folder / "config.json").write_text(json.dumps(TINY | {"in_channels": 32, "out_channels": 32, "num_layers": 1}))
    checkpoint = open_checkpoint(f"random:{folder}", steps=2)
    return checkpoint, calibrate(checkpoint, folder / "calibration", samples=1)


@pytest.mark.parametrize(
    ("kind", "weight"),
    [("int8", INT8), ("fp8", FP8), ("int8", INT8 | {"granularity": "tensor"})],
    ids=["int8", "fp8", "int8 per tensor"],
)
def test_a_quantized_convolution_stays_one(kind, weight, wide_input, tmp_path):
    checkpoint, calibration = wide_input
    number = {key: value for key, value in weight.items() if key != "granularity"}
    rule = {"layers": "*", "weight": weight, "activation": number}
    source = quantize(checkpoint, recipes.parse("test", {"rule": [rule]}), calibration, tmp_path / "quantized")
    graph = lower(source, tmp_path / "graph", dtype="fp16")
    engine = build(graph, "trt-rtx", tmp_path / "engine", gpu="sm89")
    (row,) = [r for r in read_plan(engine) if r.kind == "correlation"]
    assert "pos_embed.proj/Conv" in row.onnx_nodes
    assert row.input_types[0] == kind
    assert kind in row.constant_types
    fp32 = lower(source, tmp_path / "fp32", dtype="fp32")
    for compared in compare_layers(Run(source, {"fp32": fp32}, {})):
        assert compared["sqnr_db"] is None or compared["sqnr_db"] >= 60, compared
        assert compared["codes_different"] <= 1e-4, compared
