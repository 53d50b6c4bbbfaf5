"""SmoothQuant on a small DiT: the same function, other weights, inputs that quantize better; folded or multiplied."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from common import TINY

from engines.errors import UserError
from exporter import scaling
from exporter.formats.int import Format as Int
from exporter.methods import smoothquant
from exporter.methods.smoothquant import FLOOR, Options, smoothing_factor
from exporter.metrics import sqnr_db
from exporter.models import family_of
from exporter.modules import float_layers
from exporter.tensors import fake_quantize, scale_for

CONFIG = {key: value for key, value in TINY.items() if not key.startswith("_")}
FAMILY = family_of(TINY["_class_name"], CONFIG, "tiny")
WIDTH = CONFIG["num_attention_heads"] * CONFIG["attention_head_dim"]
OUTLIERS = [3, 17]  # channels
# The fold is an identity of real numbers; in fp64 each of the few hundred dependent operations rounds by 1e-16.
TOLERANCE = 1e-11


@pytest.fixture(scope="module")
def original():
    """A DiT in fp64 whose parameters are all random, and whose blocks modulate two channels far beyond the others."""
    torch.manual_seed(0)
    model = FAMILY.build().double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.1)
    for block in model.transformer_blocks:
        shift, scale, _, shift_ff, scale_ff, _ = block.norm1.linear.bias.split(WIDTH)
        for rows in (shift, scale, shift_ff, scale_ff):
            rows[OUTLIERS] = 40.0
    return model


@pytest.fixture
def model(original):
    return copy.deepcopy(original)


@pytest.fixture(scope="module")
def feeds():
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(3, *FAMILY.latent_shape(), dtype=torch.float64, generator=generator),
        "timestep": torch.tensor([999, 500, 1]),
        "class_labels": torch.tensor([0, 7, 10]),
    }


def consumers(model) -> list[str]:
    return [path for fold in FAMILY.folds(model) for path in fold.consumers]


def inputs_of(model, paths: list[str], feeds) -> dict[str, torch.Tensor]:
    """The inputs that layers see in one call of the model."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _module, args, path=path: seen.update({path: args[0]})
        )
        for path in paths
    ]
    FAMILY.call(model, feeds)
    for handle in handles:
        handle.remove()
    return seen


def channel_absmax(model, feeds, paths: list[str] | None = None) -> dict[str, torch.Tensor]:
    inputs = inputs_of(model, consumers(model) if paths is None else paths, feeds)
    return {path: x.abs().flatten(0, -2).amax(dim=0) for path, x in inputs.items()}


def prepare(model, feeds, alpha: float = 0.5, paths: list[str] | None = None) -> list[str]:
    """Folds what folds exactly; returns the layers that changed."""
    wanted = consumers(model) if paths is None else paths
    folds = FAMILY.folds(model)
    found = smoothquant.factors(model, wanted, folds, channel_absmax(model, feeds), Options(alpha, multiply=False))
    assert scaling.apply(model, folds, found) == []
    return [path for paths in found for path in paths.split("+")]


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_the_models_function_stays_as_it_was(model, feeds, alpha):
    before = FAMILY.call(model, feeds)
    prepare(model, feeds, alpha)
    after = FAMILY.call(model, feeds)
    assert before.abs().max() > 0.1
    assert (after - before).abs().max() <= TOLERANCE * before.abs().max()


def test_the_function_stays_on_inputs_that_were_never_observed(model, feeds):
    other = {**feeds, "hidden_states": feeds["hidden_states"].flip(0) * 3, "timestep": torch.tensor([3, 30, 300])}
    before = FAMILY.call(model, other)
    prepare(model, feeds)
    assert (FAMILY.call(model, other) - before).abs().max() <= TOLERANCE * before.abs().max()


def test_every_consumer_changes_and_is_reported(original, model, feeds):
    changed = prepare(model, feeds)
    assert sorted(changed) == sorted(consumers(model))
    assert (
        len(changed) == CONFIG["num_layers"] * 5
    )  # per block: q, k, v, the attention's output, the feed-forward's first
    for path in changed:
        assert not torch.equal(model.get_submodule(path).weight, original.get_submodule(path).weight)


def test_only_consumers_and_what_feeds_them_change(original, model, feeds):
    prepare(model, feeds)
    touched = {f"{path}.weight" for path in consumers(model)}
    touched |= {
        f"{path}.{leaf}" for fold in FAMILY.folds(model) for path, _, _ in fold.parts for leaf in ("weight", "bias")
    }
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, original.get_parameter(name))}
    assert changed == touched


def test_layers_of_other_rules_and_their_inputs_stay_as_they_were(original, model, feeds):
    kept = "transformer_blocks.0.attn1.to_k"
    changed = prepare(model, feeds, paths=[path for path in consumers(model) if path != kept])
    assert not [path for path in changed if path.startswith("transformer_blocks.0.attn1.to_") and path[-1] in "qkv"]
    before, after = inputs_of(original, [kept], feeds)[kept], inputs_of(model, [kept], feeds)[kept]
    assert (after - before).abs().max() <= TOLERANCE * before.abs().max()
    assert torch.equal(model.get_submodule(kept).weight, original.get_submodule(kept).weight)


def test_no_wanted_layer_no_change(original, model, feeds):
    assert prepare(model, feeds, paths=[]) == []
    assert all(torch.equal(p, original.get_parameter(name)) for name, p in model.named_parameters())


@pytest.mark.parametrize("path", ["transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.0.proj"])
def test_inputs_with_outlier_channels_quantize_better(original, model, feeds, path):
    prepare(model, feeds)

    def quality(net) -> float:
        """SQNR of the layer's output when its input alone is quantized, to INT8 with one scale."""
        layer, x = net.get_submodule(path), inputs_of(net, [path], feeds)[path]
        return sqnr_db(layer(x), layer(fake_quantize(x, scale_for(x.abs().max(), Int(8)), Int(8))))

    x = inputs_of(original, [path], feeds)[path].abs().flatten(0, -2).amax(dim=0)
    assert x[OUTLIERS].min() > 5 * x.median()  # the outliers are there
    assert quality(model) > quality(original) + 3  # dB: half the noise power at least


def test_at_alpha_one_every_channel_reaches_equally_far(model, feeds):
    prepare(model, feeds, alpha=1.0)
    for path, largest in channel_absmax(model, feeds).items():
        assert largest.max() <= largest.min() * (1 + 1e-9), path  # fp64: every channel was divided by its own largest


def linears(model) -> list[str]:
    return [path for path, layer in float_layers(model).items() if isinstance(layer, torch.nn.Linear)]


def test_layers_behind_no_fold_multiply_their_input_and_the_function_stays(original, model, feeds):
    paths, folds = linears(model), FAMILY.folds(model)
    before = FAMILY.call(model, feeds)
    found = smoothquant.factors(model, paths, folds, channel_absmax(model, feeds, paths), Options(0.5))
    explicit = scaling.apply(model, folds, found)
    assert sorted(explicit) == sorted(set(paths) - set(consumers(model)))
    # multipliers are fp16 and their reciprocals fp32: each layer's weight is then off by 1e-7 of itself
    assert (FAMILY.call(model, feeds) - before).abs().max() <= 1e-5 * before.abs().max()
    assert (FAMILY.call(original, feeds) - before).abs().max() <= TOLERANCE * before.abs().max()


def test_a_layer_whose_fold_is_torn_by_another_rule_multiplies_its_own_input(model, feeds):
    kept = "transformer_blocks.0.attn1.to_k"
    paths = [path for path in consumers(model) if path != kept]
    found = smoothquant.factors(model, paths, FAMILY.folds(model), channel_absmax(model, feeds), Options())
    assert {"transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_v"} <= found.keys()
    assert kept not in {path for key in found for path in key.split("+")}


def test_the_factors_of_a_convolution_follow_its_input_channels():
    conv = torch.nn.Conv2d(3, 2, 3, bias=False)
    torch.nn.init.ones_(conv.weight)
    conv.weight.data[:, 1] = 4.0
    (factor,) = smoothquant.factors(
        torch.nn.Sequential(conv), ["0"], [], {"0": torch.tensor([4.0, 4.0, 16.0])}, Options(0.5)
    ).values()
    assert factor.tolist() == pytest.approx([2, 1, 4], rel=1e-6)  # fp32 powers


def test_the_factor_is_that_of_the_paper():
    activation, weight = torch.tensor([4.0, 1.0, 100.0]), torch.tensor([1.0, 0.25, 4.0])
    # fp32 powers are good to 1e-6
    assert smoothing_factor(activation, weight, 0.5).tolist() == pytest.approx([2, 2, 5], rel=1e-6)
    assert smoothing_factor(activation, weight, 1.0).tolist() == pytest.approx([4, 1, 100], rel=1e-6)
    assert smoothing_factor(activation, weight, 0.0).tolist() == pytest.approx([1, 4, 0.25], rel=1e-6)


def test_silent_channels_get_a_finite_positive_factor():
    factor = smoothing_factor(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 0.0]), 0.5)
    assert factor.isfinite().all()
    assert (factor > 0).all()
    assert factor[1].item() == pytest.approx(math.sqrt(FLOOR), rel=1e-6)  # fp32 powers


@pytest.mark.parametrize("alpha", [-0.01, 1.01, math.nan, math.inf, -math.inf])
def test_alpha_outside_its_range_is_the_users_error(alpha):
    with pytest.raises(UserError, match=f"alpha = {alpha}") as caught:
        Options(alpha)
    assert "0 … 1" in caught.value.fix


def test_a_convolution_in_groups_is_smoothed_by_what_each_group_reads():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(8, 12, 3, groups=4)
    model = torch.nn.ModuleDict({"conv": conv})
    x = torch.randn(2, 8, 5, 5)
    x[:, 3] *= 50
    before = conv(x)
    seen = x.abs().amax(dim=(0, 2, 3))
    factors = smoothquant.factors(model, ["conv"], [], {"conv": seen}, Options())
    assert factors["conv"].shape == (8,)
    assert factors["conv"].argmax() == 3
    # channels 2 and 3 are those of the second group, whose outputs are 3 to 5
    assert torch.allclose(factors["conv"][3], (seen[3] / conv.weight[3:6, 1].abs().max()).sqrt().detach(), rtol=1e-5)
    scaling.apply(model, [], factors)
    assert torch.allclose(conv(x), before, rtol=1e-4, atol=1e-4)  # fp32 rounds otherwise
