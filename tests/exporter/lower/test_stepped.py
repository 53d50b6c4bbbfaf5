"""Activations with a scale for every step: engines agree with PyTorch, rows of all steps mixed, and multiply INT8."""

from __future__ import annotations

import json

import pytest
import torch
from common import TINY
from road import (
    assert_layers_agree,
    assert_multiplies_in_int8,
    assert_other_sizes_agree,
    assert_recorded_feeds_agree,
)
from safetensors.torch import load_file

from engines import backends
from engines.build import build
from engines.errors import UserError
from engines.plans import read_plan
from exporter import quantized, recipe
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.lower import lower
from exporter.quantize import quantize
from exporter.run_folder import Run
from exporter.validate import run_mixed


def rule(layers, bits, *, zero_point=False, split=False):
    """A rule that quantizes weights and, with a scale for every step, activations to as many bits."""
    activation = {"format": "int", "bits": bits, "observer": "mse", "granularity": "step", "zero_point": zero_point}
    weight, method = {"format": "int", "bits": bits}, {"name": "smoothquant"}
    return {"layers": layers, "split_skips": split, "activation": activation, "weight": weight, "method": method}


def stepped_recipe(*rules):
    products = {"layers": "*", "type": "attention", "activation": {"format": "int", "bits": 8, "granularity": "step"}}
    kept = {"layers": "*", "scope": "outside_blocks", "keep": "float"}
    return recipe.parse("stepped", {"rule": [kept, products, *rules]})


SMALL = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [128],  # narrower, what an engine keeps beside weights passes for weights that were expanded
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ["AttnDownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "attention_head_dim": 16,
    "add_attention": False,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small random U-Net: convolutions, shortcuts, matmuls; and its calibration."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "config.json").write_text(json.dumps(SMALL))
    checkpoint = open_checkpoint(f"random:{folder}", steps=2)
    return checkpoint, calibrate(checkpoint, folder / "calibration", samples=4)


def test_the_tables_row_may_be_fed_instead_of_its_number(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"num_layers": 1}))
    checkpoint = open_checkpoint(f"random:{tmp_path}", steps=2)
    calibration = calibrate(checkpoint, tmp_path / "calibration", samples=4)
    source = quantize(checkpoint, stepped_recipe(rule("*", 8)), calibration, tmp_path / "quantized")
    found = {}
    for way in ("index", "row"):
        graph = lower(source, tmp_path / way, step_input=way)
        names = [entry["name"] for entry in graph.info["inputs"] if entry["name"].startswith("step")]
        assert names == ["step_row" if way == "row" else "step"]
        runner = backends.open_runner(build(graph, "ort", tmp_path / f"{way}-engine"))
        found[way] = run_mixed(runner, load_file(source.file(quantized.REFERENCE)), rows=8)
    for step, output in found["index"].items():
        assert torch.equal(output, found["row"][step])


def test_a_model_without_scales_by_step_has_no_row_to_feed(small, tmp_path):
    checkpoint, calibration = small
    plain = recipe.parse("plain", {"rule": [{"layers": "*", "weight": {"format": "int", "bits": 8}}]})
    source = quantize(checkpoint, plain, calibration, tmp_path / "quantized")
    with pytest.raises(UserError, match="no scales by step"):
        lower(source, tmp_path / "graph", step_input="row")


def test_engines_agree_and_multiply_in_int8(small, tmp_path):
    """4 bits with a zero point and 8 without, in one graph; each has convolutions, matmuls and a split shortcut."""
    checkpoint, calibration = small
    four = rule("*resnets.0.*", 4, zero_point=True, split=True)
    asked = stepped_recipe(four, rule("*", 8, split=True))
    source = quantize(checkpoint, asked, calibration, tmp_path / "quantized")
    specs = quantized.specs(source)
    assert {(spec.activation.bits, "conv" in path, "skip" in path) for path, spec in specs.items()} == {
        (bits, *kind) for bits in (4, 8) for kind in ((True, True), (True, False), (False, False))
    }
    stepped = {path for path, spec in specs.items() if spec.steps}
    assert stepped == specs.keys()
    graph = lower(source, tmp_path / "graph" / "fp32", dtype="fp32")
    assert [entry for entry in graph.info["inputs"] if entry["name"] == "step"] == [
        {"name": "step", "dtype": "int64", "shape": ["batch"]}
    ]
    run = Run(source, {"fp32": graph}, {"ort": build(graph, "ort", tmp_path / "engines" / "ort")})
    runner = backends.open_runner(run.engines["ort"])
    assert_recorded_feeds_agree(runner, run, True)
    assert_other_sizes_agree(runner, run, checkpoint, True)  # its rows are of two steps
    assert_layers_agree(run)

    half = lower(source, tmp_path / "graph" / "fp16", dtype="fp16")
    rows = read_plan(build(half, "trt-rtx", tmp_path / "trt-rtx", gpu="sm89"))
    assert_multiplies_in_int8(rows, stepped, quantized.points(source))
