"""Attention's products: as torch computes them while nothing is rounded, then of what each row's step rounds to."""

from __future__ import annotations

import json
import math

import pytest
import torch
from common import FAMILIES, TINY
from torch import nn
from torch.nn import functional as F

from engines.errors import UserError
from engines.options import Options
from exporter import quantized, recipe, steps
from exporter.attention import POINTS, PointSpec, Products, add_points, attentions, quantize_points
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.formats.int import Format as Int
from exporter.models import family_of
from exporter.plan import plan_layers
from exporter.quantize import quantize
from exporter.support import Target, refuse

PRODUCTS = {"layers": "*", "type": "attention", "activation": {"format": "int", "bits": 8}}
KEEP = {"layers": "*", "keep": "float"}


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("mask", [None, "added", "bool"])
def test_while_points_are_float_it_is_torchs_attention(mask):
    query, key, value = drawn(2, 3, 5, 8), drawn(2, 3, 7, 8) + 0.1, drawn(2, 3, 7, 8) - 0.1
    masks = {None: None, "added": drawn(2, 1, 5, 7), "bool": drawn(2, 1, 5, 7) > -1}
    found = Products()(query, key, value, masks[mask], 0.3)
    expected = F.scaled_dot_product_attention(query, key, value, masks[mask], scale=0.3)
    assert torch.allclose(found, expected, atol=1e-5)  # fp32 sums in another order


@pytest.mark.parametrize("count", [0, 3], ids=["one scale", "steps"])
@pytest.mark.parametrize("bits", [4, 8])
def test_each_row_is_rounded_by_its_own_steps_scales(count, bits):
    products = Products()
    model = nn.ModuleDict({"products": products})
    quantize_points(model, {f"products.{name}": PointSpec(Int(bits), count) for name in POINTS})
    scales = {"query": 0.3, "key": 0.25, "probabilities": 0.06, "value": 0.2}
    for name, scale in scales.items():
        values = scale * torch.tensor([1.0, 1.7, 0.6]) if count else torch.tensor(scale)
        getattr(products, name).activation_scale = values.half().double()
    query, key, value = (drawn(4, 2, n, 8).double() for n in (5, 6, 6))
    step = torch.tensor([2, 0, 1, 2])

    def rounded(name, x):
        scale = getattr(products, name).activation_scale
        scale = scale[step].reshape(-1, 1, 1, 1) if count else scale
        return (x / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale

    scores = rounded("query", query) @ rounded("key", key).transpose(-1, -2) / math.sqrt(8)
    expected = rounded("probabilities", scores.softmax(dim=-1)) @ rounded("value", value)
    with steps.at(steps.Position(step)):
        found = products(query, key, value, None, 1 / math.sqrt(8))
    assert torch.allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_attentions_are_found_and_compute_what_they_did(name):
    from families import built, feeds_of

    found = family_of(FAMILIES[name]["_class_name"], FAMILIES[name], name)
    model, feeds = built(found), feeds_of(found, {a: axis.min for a, axis in found.axes().items()} | {"batch": 2})
    paths = attentions(model)
    assert paths
    expected = found.call(model, feeds)
    add_points(model, paths)
    seen = []
    for path in paths:
        model.get_submodule(f"{path}.products.probabilities").register_forward_pre_hook(
            lambda _, args: seen.append(args[0])
        )
    output = found.call(model, feeds)
    assert len(seen) == len(paths)
    for probabilities in seen:
        assert torch.allclose(probabilities.sum(dim=-1), torch.ones(()), atol=1e-5)
    assert torch.allclose(output, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    checkpoint = open_checkpoint(f"random:{folder}", steps=3)
    return checkpoint, calibrate(checkpoint, folder / "calibration", samples=4)


def test_what_is_saved_is_read_back(tiny, tmp_path):
    checkpoint, calibration = tiny
    stepped = PRODUCTS | {"activation": PRODUCTS["activation"] | {"granularity": "step"}}
    rules = [{**stepped, "layers": "transformer_blocks.0.*"}, {**PRODUCTS, "layers": "transformer_blocks.1.*"}, KEEP]
    source = quantize(checkpoint, recipe.parse("test", {"rule": rules}), calibration, tmp_path / "out")
    points = quantized.points(source)
    assert {path: spec.steps for path, spec in points.items()} == {
        f"transformer_blocks.{block}.attn1.products.{name}": 3 - 3 * block for block in (0, 1) for name in POINTS
    }
    model = quantized.load(source)
    for path, spec in points.items():
        scale = model.get_submodule(path).activation_scale
        assert scale.shape == ((3,) if spec.steps else ())
        assert (scale > 0).all()


@pytest.mark.parametrize(
    ("rule", "named"),
    [
        ({"layers": "*", "type": "attention"}, "says no activation"),
        (PRODUCTS | {"weight": {"format": "int", "bits": 8}}, "says weight"),
        (PRODUCTS | {"split_skips": True}, "says split_skips"),
        (
            PRODUCTS | {"activation": {"format": "int", "bits": 8, "granularity": "step", "zero_point": True}},
            "zero points",
        ),
    ],
    ids=["nothing", "a weight", "a split", "a zero point"],
)
def test_a_rule_of_attentions_has_a_symmetric_activation_and_nothing_else(rule, named):
    with pytest.raises(UserError, match=named):
        recipe.parse("test", {"rule": [rule, KEEP]})


def test_a_rule_that_matches_no_attention_is_an_error(tiny, tmp_path):
    checkpoint, calibration = tiny
    asked = recipe.parse("test", {"rule": [{**PRODUCTS, "layers": "transformer_blocks.7.*"}, KEEP]})
    with pytest.raises(UserError, match=r"rule 1.*'transformer_blocks\.7\.\*'.*matches none") as caught:
        quantize(checkpoint, asked, calibration, tmp_path / "out")
    assert "attn1" in caught.value.fix


def test_a_gpu_without_the_type_of_the_products_is_refused_before_anything_is_calibrated():
    number = {"format": "fp", "exponent_bits": 4, "mantissa_bits": 3}
    products = {"layers": "*", "type": "attention", "activation": number}
    weights = {"layers": "*", "weight": {"format": "int", "bits": 8}}
    asked = recipe.parse("mine", {"rule": [products, weights]})
    targets = [Target("trt-rtx", gpu, "fp16", Options()) for gpu in ("sm89", "sm80")]
    checkpoint = open_checkpoint("digits-dit")
    model = checkpoint.skeleton()
    plan = plan_layers(model, checkpoint.family, asked)
    refuse(checkpoint, asked, model, plan, targets[:1])
    with pytest.raises(UserError, match=r"products\.query' is fp8, with no hardware for it in sm80"):
        refuse(checkpoint, asked, model, plan, targets[1:])
