"""Search of ranges and formats: never worse than rounding on its own score, and deployable where it chooses."""

from __future__ import annotations

import json

import pytest
import torch
from common import TINY
from torch import nn

from engines.errors import UserError
from exporter import formats, methods, moments, quantized
from exporter import recipe as recipes
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.formats.fp import Format as Fp
from exporter.formats.int import Format as Int
from exporter.methods import fp_search
from exporter.observers import CLIPS
from exporter.quantize import quantize
from exporter.recipe import WeightSpec
from exporter.tensors import quantize as quantize_tensor
from exporter.tensors import scale_for

GRANULARITIES = [("channel", 0), ("tensor", 0), ("block", 16)]
every_granularity = pytest.mark.parametrize(
    ("granularity", "block_size"), GRANULARITIES, ids=[name for name, _ in GRANULARITIES]
)
FOUR_BITS = formats.of_bits("auto", 4, "test")


def weight():
    """Heavy-tailed, as trained weights are; [in, out]."""
    draws = torch.randn(64, 24, generator=torch.Generator().manual_seed(0))
    return draws * draws.abs() / 8


def second_moments():
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 64)
    x += x.roll(1, dims=1)  # correlated, as layers' inputs are
    return x.T @ x / len(x)


def axis_of(granularity):
    return 0 if granularity == "block" else 1


def error(tensor, x, moments_):
    delta = (tensor.dequantize() - x).double().T  # [out, in]
    return float(((delta @ moments_.double()) * delta).sum() if moments_ is not None else delta.square().sum())


@every_granularity
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("by_output", [True, False], ids=["output", "weight"])
def test_search_is_never_worse_than_rounding_on_its_own_score(granularity, block_size, bits, by_output):
    choices = formats.of_bits("auto", bits, "test")
    spec = WeightSpec(choices[0], granularity, block_size, choices)
    axis, seen = axis_of(granularity), second_moments() if by_output else None
    score = torch.diag(seen.diagonal()) if by_output and granularity == "block" else seen
    found = fp_search.quantize_weight(weight(), spec, axis, fp_search.Options(), seen)
    for fmt in choices:
        plain = methods.load("rtn").quantize_weight(weight(), WeightSpec(fmt, granularity, block_size), axis, None)
        # the moments are summed in fp32 there, in fp64 here
        assert error(found, weight(), score) <= error(plain, weight(), score) * (1 + 1e-4), fmt


def test_ranges_are_the_best_of_every_clip_for_each_channel():
    spec, x = WeightSpec(Fp(2, 1), "channel"), weight()
    found = fp_search.quantize_weight(x, spec, 1, fp_search.Options(), None)
    for channel in range(x.shape[1]):
        column = x[:, channel]
        errors = [
            (quantize_tensor(column, scale_for(clip * column.abs().max(), Fp(2, 1)), Fp(2, 1), "tensor").dequantize()
             - column).square().sum()
            for clip in (1.0, *CLIPS.tolist())
        ]  # fmt: skip
        ours = (found.dequantize()[:, channel] - column).square().sum()
        assert ours <= min(errors) * (1 + 1e-6)


def test_the_output_score_is_the_error_of_the_layers_output():
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(2))
    delta = torch.randn(64, 24, generator=torch.Generator().manual_seed(3))
    spec = WeightSpec(Fp(2, 1), "channel")
    ours = fp_search.part_errors(delta, spec, 1, x.T @ x / len(x))
    assert torch.allclose(ours, (x @ delta).square().mean(dim=0).double(), rtol=1e-4)


def test_a_vote_takes_the_format_that_most_channels_prefer():
    spec = WeightSpec(FOUR_BITS[0], "channel", 0, FOUR_BITS)
    x = weight()
    voted = fp_search.quantize_weight(x, spec, 1, fp_search.Options(vote=True), None)
    errors = torch.stack([fp_search.best_ranges(x, spec, fmt, 1, None)[0] for fmt in FOUR_BITS])
    votes = errors.argmin(dim=0).bincount(minlength=len(FOUR_BITS))
    assert votes[FOUR_BITS.index(voted.format)] == votes.max()


@pytest.mark.parametrize(
    ("draw", "expected"),
    [("uniform", Int), ("heavy", Fp)],
)
def test_flat_weights_get_integers_and_heavy_tails_get_floats(draw, expected):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(512, 8, generator=generator) * 2 - 1
    if draw == "heavy":
        x = x / x.abs().clamp(min=0.02)  # tails of a Cauchy kind
        x = x * torch.randn(512, 8, generator=generator) ** 3
    spec = WeightSpec(Fp(2, 1), "channel", 0, (Fp(2, 1), Int(4)))
    found = fp_search.quantize_weight(x, spec, 1, fp_search.Options(), None)
    assert isinstance(found.format, expected)


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(12, 5), nn.Conv2d(6, 5, 3, stride=2, padding=1), nn.Conv2d(6, 5, 1)],
    ids=["linear", "conv", "conv 1×1"],
)
def test_moments_are_those_of_what_each_output_sums(layer):
    x = torch.randn(4, 7, 12) if isinstance(layer, nn.Linear) else torch.randn(4, 6, 8, 8)
    seen = moments.Moments(nn.ModuleDict({"a": layer}), ["a"])
    seen.see("a", x, torch.zeros(4))
    delta = torch.randn_like(layer.weight)
    before, bias = layer.weight.data, layer.bias.data
    layer.weight.data, layer.bias.data = delta, torch.zeros_like(bias)
    with torch.no_grad():
        y = layer(x)
    wanted = y.square().mean(dim=[d for d in range(y.ndim) if d != (y.ndim - 1 if y.ndim == 3 else 1)])
    layer.weight.data, layer.bias.data = before, bias
    rows = delta.flatten(1)
    assert torch.allclose(((rows @ seen.mean("a")) * rows).sum(dim=1), wanted, rtol=1e-4)


def test_of_many_positions_of_a_convolution_a_share_is_taken(monkeypatch):
    layer, x = nn.Conv2d(3, 4, 3, padding=1, stride=2), torch.randn(5, 3, 20, 20)
    generator = torch.Generator().manual_seed(0)
    whole = moments._rows(layer, x, generator)
    assert len(whole) == 5 * 10 * 10
    assert torch.allclose(
        whole @ layer.weight.flatten(1).T + layer.bias, layer(x).movedim(1, -1).flatten(0, 2), atol=1e-5
    )
    monkeypatch.setattr(moments, "ROWS", 100)
    part = moments._rows(layer, x, generator)
    assert len(part) == 100
    places = [int((whole == row).all(dim=1).nonzero()[0]) for row in part]
    assert [place // 5 for place in places] == list(range(100))  # one of every five
    assert {place % 10 for place in places} == set(range(10))  # every column, every row
    assert {place // 10 % 10 for place in places} == set(range(10))


def test_groups_of_moments_are_bounded(monkeypatch):
    model = nn.ModuleDict({name: nn.Linear(16, 4) for name in "abcde"})
    monkeypatch.setattr(moments, "GROUP_BYTES", 2 * 4 * 16**2)
    assert list(moments.groups(model, list("abcde"))) == [["a", "b"], ["c", "d"], ["e"]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY | {"num_layers": 1}))
    checkpoint = open_checkpoint(f"random:{folder}", steps=2)
    return checkpoint, calibrate(checkpoint, folder / "calibration", samples=2)


def quantized_with(tiny, folder, weight, activation=None, **options):
    checkpoint, calibration = tiny
    rule = {"layers": "*.ff.*", "weight": weight, "method": {"name": "fp_search", **options}}
    rule |= {"activation": activation} if activation else {}
    recipe = recipes.parse("test", {"rule": [rule, {"layers": "*", "keep": "float"}]})
    return quantize(checkpoint, recipe, calibration, folder / "quantized")


FP8 = {"format": "fp", "exponent_bits": 4, "mantissa_bits": 3}


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_what_is_chosen_beside_fp8_activations_is_exact_in_them(bits, tiny, tmp_path):
    source = quantized_with(tiny, tmp_path, {"format": "auto", "bits": bits}, FP8)
    for spec in quantized.specs(source).values():
        assert spec.weight.bits == bits
        assert isinstance(spec.weight, Fp)  # of the integers only INT4 has a place there: as E1M2
        assert torch.equal(spec.activation.round(spec.weight.values.nan_to_num()), spec.weight.values.nan_to_num())


def test_what_is_chosen_beside_integer_activations_is_an_integer(tiny, tmp_path):
    source = quantized_with(tiny, tmp_path, {"format": "auto", "bits": 4}, {"format": "int", "bits": 8})
    assert {spec.weight for spec in quantized.specs(source).values()} == {Int(4)}


def test_the_chosen_format_is_read_back_bit_for_bit(tiny, tmp_path):
    source = quantized_with(tiny, tmp_path, {"format": "fp", "bits": 4}, FP8)
    layers = quantized.quantized_layers(quantized.load(source))
    again = quantized.quantized_layers(quantized.load(source))
    for path, layer in layers.items():
        assert layer.spec == quantized.specs(source)[path]
        assert torch.equal(layer.weight_codes, again[path].weight_codes)
        assert int(layer.weight_codes.max()) < 16


def test_a_method_that_chooses_nothing_needs_a_format():
    with pytest.raises(UserError, match="leaves the format open") as caught:
        recipes.parse("test", {"rule": [{"layers": "*", "weight": {"format": "fp", "bits": 4}}]})
    assert "fp_search" in caught.value.fix


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"format": "fp", "bits": 4, "exponent_bits": 2}, "exponent_bits"),
        ({"format": "auto"}, "bits"),
        ({"format": "auto", "bits": 9}, "at most 7"),
        ({"format": "fp", "bits": 1}, "bits"),
    ],
)
def test_open_formats_that_make_no_sense_are_refused(table, named):
    with pytest.raises(UserError) as caught:
        recipes.parse("test", {"rule": [{"layers": "*", "weight": table, "method": {"name": "fp_search"}}]})
    assert named in str(caught.value)
