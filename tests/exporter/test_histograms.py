"""Histograms of the worst layers: every weight and every input counted once, beside the range that was chosen."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from exporter import damage, histograms, quantized, ranges, recipe
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.histograms import worst_layers_histograms
from exporter.quantize import quantize, reference_feeds
from exporter.runners import TorchRunner

INT8 = {"format": "int", "bits": 8}
RECIPE = {
    "rule": [
        {"layers": "*", "scope": "outside_blocks", "keep": "float"},
        {"layers": "*.attn1.to_q", "weight": INT8, "method": {"name": "rtn"}},
        {"layers": "*", "weight": INT8, "activation": INT8, "method": {"name": "smoothquant"}},
    ]
}
FLOAT_INPUT, MULTIPLIED = "transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.net.2"


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("histograms")
    checkpoint = open_checkpoint(str(tiny_folder), steps=3)
    data = calibrate(checkpoint, folder / "calibration", samples=2)
    return checkpoint, quantize(checkpoint, recipe.parse("test", RECIPE), data, folder / "quantized")


@pytest.fixture(scope="module")
def found(made):
    rows = [{"layer": path, "step": 0, "sqnr_db": db} for path, db in ((FLOAT_INPUT, 20.0), (MULTIPLIED, 10.0))]
    return worst_layers_histograms(*made, rows)


def test_layers_come_by_the_lowest_error_of_their_outputs(made):
    names = sorted(made[1].info["layers"])[:3]
    errors = [(names[0], 30.0), (names[1], None), (names[2], 40.0), (names[0], None), (names[2], 12.0)]
    rows = [{"layer": path, "step": step, "sqnr_db": db} for step, (path, db) in enumerate(errors)]
    rows.append({"layer": "an attention's products", "step": 0, "sqnr_db": -9.0})  # which has no weight
    found = worst_layers_histograms(*made, rows)
    json.dumps(found, allow_nan=False)
    assert [(row["layer"], row["sqnr_db"]) for row in found] == [(names[2], 12.0), (names[0], 30.0), (names[1], None)]
    rows.append({"layer": names[1], "step": 5, "sqnr_db": None, "not_finite": 1})
    assert worst_layers_histograms(*made, rows)[0]["layer"] == names[1]


def test_every_weight_is_counted_before_and_after(made, found):
    model = damage.prepared(*made)
    for row in found:
        weight, shown = model.get_submodule(row["layer"]).weight, row["weight"]
        assert sum(shown["float"]) == sum(shown["quantized"]) == weight.numel()
        assert len(shown["edges"]) == len(shown["float"]) + 1
        assert shown["edges"][0] <= float(weight.min())
        assert float(weight.max()) <= shown["edges"][-1]
        inner = torch.histogram(weight.detach(), torch.tensor(shown["edges"], dtype=torch.float32)).hist
        assert torch.tensor(shown["float"]).sub(inner).abs().sum() <= 0.01 * weight.numel()  # edges are rounded


def test_inputs_are_those_that_the_layer_quantizes_at_all_recorded_steps(made, found):
    checkpoint, source = made
    reference, model = load_file(source.file(quantized.REFERENCE)), damage.prepared(checkpoint, source)
    seen = []
    model.get_submodule(MULTIPLIED).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for step in range(3):
        TorchRunner("float", model, checkpoint.family).run_tensors(reference_feeds(reference, step))
    shown, row = found[0]["activation"], ranges.read(source)["layers"][MULTIPLIED]
    assert found[0]["layer"] == MULTIPLIED
    assert sum(shown["counts"]) == sum(x.numel() for x in seen)
    assert (shown["range"], shown["steps"]) == (row["range"], [0, 1, 2])
    largest = max(float(x.abs().max()) for x in seen)
    edges = [edge for edge, count in zip(shown["edges"], shown["counts"], strict=False) if count]
    width = shown["edges"][1] - shown["edges"][0]
    assert min(edges) >= -largest - width
    assert max(edges) <= largest


def test_a_layer_whose_input_stays_float_has_no_range(found):
    assert found[1]["layer"] == FLOAT_INPUT
    assert found[1]["activation"] is None


def test_weights_that_are_all_zero_are_counted_at_zero():
    shown = histograms._weight_histogram(torch.zeros(3, 4), torch.zeros(3, 4))
    middle = histograms.BINS // 2
    assert shown["float"][middle] == shown["quantized"][middle] == 12
    assert math.isclose(shown["edges"][middle], -shown["edges"][middle + 1])
