"""Factors between activations and weights: folded or multiplied, what the model computes stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from exporter import scaling
from exporter.models import Fold
from exporter.modules import QuantizedLayer, float_layer, multiply_input
from exporter.specs import LayerSpec

FOLD = Fold(("1", "2"), (("0", slice(None), "affine"),))
# fp32: every product and sum rounds by 6e-8, a few dozen of them one after the other
TOLERANCE = 1e-5


class Net(nn.Sequential):
    """A norm that two linear layers read, and a convolution behind a nonlinearity."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.LayerNorm(6), nn.Linear(6, 4), nn.Linear(6, 4, bias=False), nn.Conv2d(4, 3, 3))

    def forward(self, x):
        x = self[0](x)
        x = torch.nn.functional.silu(self[1](x) * self[2](x))
        return self[3](x.movedim(-1, 1))


@pytest.fixture
def net():
    made = Net().eval().requires_grad_(False)
    made[0].weight.copy_(torch.rand(6) + 0.5)
    made[0].bias.copy_(torch.randn(6))
    return made


@pytest.fixture
def x():
    return torch.randn(2, 5, 5, 6, generator=torch.Generator().manual_seed(1))


def assert_same(after, before):
    assert (after - before).abs().max() <= TOLERANCE * before.abs().max()


def test_the_key_of_a_group_joins_its_layers():
    assert scaling.key(("a.to_q", "a.to_k")) == "a.to_q+a.to_k"
    assert scaling.key(("a",)) == "a"


def test_a_factor_that_folds_adds_nothing_and_changes_both_sides(net, x):
    before, original = net(x), copy.deepcopy(net)
    factor = torch.tensor([0.1, 0.5, 1.0, 2.0, 7.0, 40.0])
    assert scaling.apply(net, [FOLD], {"1+2": factor}) == []
    assert_same(net(x), before)
    for layer in (1, 2):
        assert torch.equal(net[layer].weight, original[layer].weight * factor)
        assert not net[layer]._forward_pre_hooks
    torch.testing.assert_close(net[0](x), original[0](x) / factor, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(("path", "width"), [("1", 6), ("3", 4)], ids=["linear", "convolution"])
def test_a_factor_that_folds_nowhere_becomes_a_multiply_of_the_layers_input(net, x, path, width):
    before, seen = net(x), []
    factor = torch.logspace(-1, 2, width)
    assert scaling.apply(net, [FOLD], {path: factor}) == [path]
    assert_same(net(x), before)
    layer = float_layer(net, path)
    multiplier = layer.get_buffer("input_multiplier")
    assert torch.equal(multiplier, multiplier.half().float())  # it ships as fp16
    torch.testing.assert_close(multiplier.flatten(), 1 / factor, rtol=2**-11, atol=0)  # fp16 rounds by half of 2^-10
    layer.register_forward_pre_hook(lambda _layer, args: seen.append(args[0]))
    net(x)
    entering = net[0](x) if path == "1" else None
    if entering is not None:
        assert torch.equal(seen[0], entering * multiplier)


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_a_multiplier_beyond_fp16_ends_at_its_range_and_the_weights_follow(net, x, size):
    before = net(x)
    scaling.apply(net, [], {"1": torch.full((6,), size)})
    multiplier = net[1].get_buffer("input_multiplier")
    assert multiplier.half().isfinite().all()
    assert multiplier.unique().tolist() == [scaling.MOST if size < 1 else scaling.LEAST]
    assert_same(net(x), before)


def test_one_reader_of_a_fold_alone_is_multiplied_not_folded(net, x):
    before = net(x)
    assert scaling.apply(net, [FOLD], {"2": torch.linspace(0.5, 3, 6)}) == ["2"]
    assert_same(net(x), before)


def test_folds_and_multiplies_go_together(net, x):
    before = net(x)
    factors = {"1+2": torch.linspace(0.2, 5, 6), "3": torch.linspace(0.2, 5, 4)}
    assert scaling.apply(net, [FOLD], factors) == ["3"]
    assert_same(net(x), before)


@pytest.mark.parametrize("path", ["1", "3"])
def test_a_quantized_layer_multiplies_its_input_as_the_float_layer_did(net, x, path):
    from exporter.formats.int import Format as Int
    from exporter.methods import rtn
    from exporter.recipe import WeightSpec
    from exporter.specs import oriented

    width = float_layer(net, path).weight.shape[1]
    (path,) = scaling.apply(net, [], {path: torch.linspace(0.5, 3, width)})
    source = float_layer(net, path)
    layer = QuantizedLayer(source, LayerSpec(Int(8), "channel", 0, None, multiplied=True))
    tensor = rtn.quantize_weight(oriented(source, layer.spec), WeightSpec(Int(8)), layer.axis, rtn.Options())
    layer.weight_codes, layer.weight_scale = tensor.codes, tensor.scale
    layer.input_multiplier = source.get_buffer("input_multiplier")
    inputs = x[..., :width] if path == "1" else x.movedim(-1, 1)[:, :width]
    wanted = source(inputs)  # its hook multiplies too
    assert (layer(inputs) - wanted).norm() <= 0.02 * wanted.norm()  # 127 steps to each side


def test_convolutions_multiply_their_second_axis():
    seen = []
    for layer, x in ((nn.Conv2d(3, 2, 1), torch.ones(2, 3, 4, 3)), (nn.Linear(3, 2), torch.ones(2, 4, 3))):
        multiply_input(layer, torch.tensor([1.0, 2.0, 3.0]))
        layer.register_forward_pre_hook(lambda _layer, args: seen.append(args[0]))
        layer(x)
    assert seen[0][0, :, 0, 0].tolist() == [1, 2, 3]
    assert seen[1][0, 0].tolist() == [1, 2, 3]


def test_factors_are_stored_and_none_leave_no_file(tmp_path):
    scaling.save({}, tmp_path)
    assert list(tmp_path.iterdir()) == []
    scaling.save({"a+b": torch.tensor([1.0, 2.0])}, tmp_path)
    assert load_file(tmp_path / scaling.FILE)["a+b"].tolist() == [1, 2]


def test_what_was_moved_is_told_by_layers():
    made = scaling.table({"a.to_q+a.to_k": {"changed": 0.25, "median": 1.0}, "b": {"changed": 1.0, "median": 1.5}})
    cells = [list(column.cells) for column in made.columns]
    assert cells == [["a.to_q, to_k", "b"], ["25 %", "100 %"], ["1", "1.5"]]
