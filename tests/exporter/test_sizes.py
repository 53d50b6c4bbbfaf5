"""Sizes are known before there is a code: what is promised is what the stages write."""

from __future__ import annotations

import json

import pytest
from common import FAMILIES, TINY
from common import RECIPES as SHIPPED

from exporter import recipe, sizes
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.lower import lower
from exporter.plan import plan_layers
from exporter.quantize import quantize

INT8 = {"format": "int", "bits": 8}
FP8 = {"format": "fp", "exponent_bits": 4, "mantissa_bits": 3}
FP4 = {"format": "fp", "exponent_bits": 2, "mantissa_bits": 1}
REST = {"layers": "*", "keep": "float"}
RECIPES = {
    "fp8": [{"layers": "*", "weight": FP8, "activation": FP8}],
    "int4 in blocks": [
        {"layers": "*.ff.*", "weight": {"format": "int", "bits": 4, "granularity": "block", "block_size": 16}},
        REST,
    ],
    "by step": [
        {"layers": "*", "type": "attention", "activation": {**INT8, "granularity": "step"}},
        {
            "layers": "*.attn1.*", "weight": INT8, "activation": {**INT8, "granularity": "step", "zero_point": True},
            "method": {"name": "smoothquant"},
        },
        REST,
    ],
    "smoothed": [{"layers": "*", "weight": INT8, "activation": INT8, "method": {"name": "smoothquant"}}],
    "codebooks": [
        {
            "layers": "*.ff.*", "weight": {"format": "codebook", "vector_size": 2, "codebook_size": 64},
            "method": {"name": "kmeans", "iterations": 1},
        },
        REST,
    ],
    "fp4": [{"layers": "*.ff.*", "weight": FP4, "activation": FP8}, REST],
}  # fmt: skip


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """Returns a checkpoint of drawn weights and one trajectory of two steps."""

    def make(config):
        folder = tmp_path_factory.mktemp("random")
        (folder / "config.json").write_text(json.dumps(config))
        checkpoint = open_checkpoint(f"random:{folder}", steps=2)
        return checkpoint, calibrate(checkpoint, folder / "calibration", samples=1)

    return make


@pytest.fixture(scope="module")
def tiny(random_model):
    return random_model(TINY)


def promised(checkpoint, asked):
    model = checkpoint.skeleton()
    plan = plan_layers(model, checkpoint.family, asked)
    return sizes.calibrated(plan, checkpoint.family, model, steps=2)


@pytest.mark.parametrize("name", RECIPES)
def test_a_tiny_dits_sizes_are_the_promised_ones(name, tiny, tmp_path):
    checkpoint, calibration = tiny
    asked = recipe.parse("test", {"rule": RECIPES[name]})
    plan = promised(checkpoint, asked)
    made = quantize(checkpoint, asked, calibration, tmp_path / "quantized")
    held = sizes.stored(checkpoint.family, plan, checkpoint.weights.halves())
    assert held.bytes == pytest.approx(made.info["weights"]["bytes"], rel=0.001)
    assert held.bits_per_weight == pytest.approx(made.info["weights"]["bits_per_weight"], rel=1e-6)
    if name == "by step":  # whose graph holds a table besides
        graph = lower(made, tmp_path / "graph", dtype="fp16")
        assert sizes.graph_bytes(checkpoint.family, plan, "fp16") == pytest.approx(graph.info["weight_bytes"], rel=0.03)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("name", SHIPPED)
def test_a_graphs_weights_are_the_promised_ones(name, dtype, checkpoint, graph_of):
    graph = graph_of(name, dtype)
    plan = promised(checkpoint, recipe.load(name))
    assert sizes.graph_bytes(checkpoint.family, plan, dtype) == pytest.approx(graph.info["weight_bytes"], rel=0.03)


def test_a_unets_sizes_are_the_promised_ones_its_skips_split(random_model, tmp_path):
    checkpoint, calibration = random_model(FAMILIES["sd"])
    asked = recipe.load("int8")
    plan = promised(checkpoint, asked)
    assert plan.splits
    made = quantize(checkpoint, asked, calibration, tmp_path / "quantized")
    held = sizes.stored(checkpoint.family, plan, checkpoint.weights.halves())
    assert held.bytes == pytest.approx(made.info["weights"]["bytes"], rel=0.001)
