"""A scale for every step: what a stepped layer computes is what its scales say, row by row, shifted or not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engines.errors import UserError
from exporter import observers, steps
from exporter.activations import Readers, Stepped
from exporter.formats.int import Format as Int
from exporter.metrics import bootstrap_ci95
from exporter.modules import SteppedLayer, quantized_layer, step_unit
from exporter.recipe import ActivationSpec
from exporter.specs import LayerSpec, oriented
from exporter.straight_through import straight_through
from exporter.tensors import quantize, scale_for

SCALES = torch.tensor([0.11, 0.04, 0.0234375])
SHIFTS = torch.tensor([-100.0, 3.0, 0.0])


def stepped(*, conv, bits=8, shifted=False, multiplied=False):
    torch.manual_seed(0)
    source = nn.Conv2d(6, 8, 3, padding=1, stride=2) if conv else nn.Linear(6, 8)
    source.requires_grad_(False)
    spec = LayerSpec(Int(8), "channel", 0, Int(bits), multiplied=multiplied, steps=3, shifted=shifted)
    weight, axis = oriented(source, spec), 0 if conv else 1
    scale = scale_for(weight.abs().amax(dim=[d for d in range(weight.ndim) if d != axis]), Int(8))
    layer = quantized_layer(source, spec)
    assert isinstance(layer, SteppedLayer)
    layer._buffers |= quantize(weight, scale, Int(8), "channel", axis).buffers()
    layer.activation_scale = SCALES.half().float()
    if shifted:
        layer.activation_shift = SHIFTS.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if multiplied:
        layer.input_multiplier = torch.linspace(0.5, 2, 6).reshape(-1, *[1] * (2 * conv))
    layer.sum_shift()
    return layer


def by_definition(layer, x, step):
    """Quantizes each row by its own step's scale and zero point, in fp64, and multiplies what that stands for."""
    fmt = layer.spec.activation
    low, high = float(fmt.values.min()), fmt.max_value
    rows = []
    for row, at in zip(x.double(), step.tolist(), strict=True):
        if layer.spec.multiplied:
            row = row * layer.input_multiplier
        scale = layer.activation_scale[at].double()
        shift = layer.activation_shift[at].double() if layer.spec.shifted else 0.0
        rows.append((((row / scale + shift).round().clamp(low, high)) - shift) * scale)
    weight, bias = layer.weight_tensor.dequantize().double(), layer.bias.double()
    inputs = torch.stack(rows)
    return F.conv2d(inputs, weight, bias, **layer.conv) if layer.conv else F.linear(inputs, weight.T, bias)


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shifted", [False, True], ids=["symmetric", "shifted"])
@pytest.mark.parametrize("multiplied", [False, True], ids=["", "multiplied"])
def test_every_row_is_quantized_by_its_own_step(conv, bits, shifted, multiplied):
    layer = stepped(conv=conv, bits=bits, shifted=shifted, multiplied=multiplied)
    x = torch.randn(5, 6, 9, 9) if conv else torch.randn(5, 7, 6)
    step = torch.tensor([2, 0, 1, 2, 0])
    with steps.at(steps.Position(step)):
        y = layer.double()(x.double())
    expected = by_definition(layer, x, step)
    # fp64 both; a value within 1e-15 of a rounding boundary could differ, and none of so few is
    assert torch.allclose(y, expected, rtol=1e-9, atol=1e-9)
    plain = nn.Module.to(layer, torch.float32)
    with steps.at(steps.Position(step)):
        assert torch.allclose(plain(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_a_shifts_zeros_around_a_convolution_stay_zeros():
    layer = stepped(conv=True, shifted=True)
    with steps.at(steps.Position(torch.tensor([0]))):
        y = layer(torch.zeros(1, 6, 9, 9))
    assert torch.allclose(y, layer.bias.reshape(1, -1, 1, 1).expand_as(y), atol=1e-4)


def test_the_unit_is_the_largest_power_of_two_under_every_scale():
    assert step_unit(SCALES).item() == 2.0**-6
    assert step_unit(torch.tensor([0.25, 0.5])).item() == 0.25
    for scale in torch.rand(100, generator=torch.Generator().manual_seed(0)) + 1e-3:
        assert scale / 2 < step_unit(scale[None]) <= scale


def test_without_a_step_it_says_so():
    with pytest.raises(UserError, match="called without one"):
        stepped(conv=False)(torch.zeros(1, 6))


@pytest.mark.parametrize("zero_point", [False, True])
def test_scales_follow_what_each_step_showed_and_unseen_steps_take_the_nearests(zero_point):
    rule = ActivationSpec(Int(8), "absmax", granularity="step", zero_point=zero_point)
    one = Stepped(rule, 5)
    for step, largest in ((0, 8.0), (3, 1.0)):
        one.update(torch.linspace(-0.1 * largest if zero_point else -largest, largest, 101))
        one.finish(step)
    state = one.state()
    width = 1.1 / 255 if zero_point else 1 / 127
    expected = torch.tensor([8.0, 8.0, 1.0, 1.0, 1.0]) * width
    assert torch.allclose(state["activation_scale"], expected, rtol=1e-3)  # rounded up to fp16
    if zero_point:
        assert state["activation_shift"].tolist() == [round(0.1 / 1.1 * 255) - 128] * 5


def test_codes_with_a_zero_point_reach_both_ends():
    seen = observers.TwoSided()
    seen.update(torch.tensor([-0.17, 0.0, 3.0, 1.0]))
    scale, shift = seen.fit(Int(4), search=False)
    assert (-8 - shift) * scale <= -0.17 + scale / 2
    assert (7 - shift) * scale >= 3.0 - scale / 2


def test_searching_the_end_leaves_less_error_than_taking_the_largest():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)).relu() - 0.1
    seen = observers.TwoSided()
    seen.update(x)

    def error(scale, shift):
        return float((((x / scale + shift).round().clamp(-8, 7) - shift) * scale - x).square().mean())

    assert error(*seen.fit(Int(4), search=True)) < 0.9 * error(*seen.fit(Int(4), search=False))


def test_readers_of_one_tensor_are_told_and_others_are_not():
    eight, four = ActivationSpec(Int(8)), ActivationSpec(Int(4))
    readers = Readers({"q": eight, "k": eight, "v": four, "out": eight})
    x = torch.zeros(3)
    assert [readers.leads("q", x), readers.leads("k", x), readers.leads("v", x)] == [True, False, True]
    assert readers.leads("out", x.clone())
    assert readers.leader == {"q": "q", "k": "q", "v": "v", "out": "out"}


def test_where_ranges_drift_over_the_steps_a_scale_for_each_lowers_the_layers_error():
    """Planted: inputs grow tenfold from step to step; rows' relative errors, intervals apart."""
    generator = torch.Generator().manual_seed(0)
    step = torch.arange(3).repeat_interleave(64)
    x = torch.randn(192, 6, generator=generator) * 10.0 ** step[:, None]
    plain = nn.Linear(6, 8).requires_grad_(False)
    fmt, exact = Int(8), plain(x)
    rule = ActivationSpec(fmt, "mse", granularity="step")
    by_step, whole = Stepped(rule, 3), observers.Mse()
    for number in range(3):
        by_step.update(x[step == number])
        by_step.finish(number)
    whole.update(x)
    scales = {
        "one": scale_for(torch.tensor(whole.range(fmt)), fmt).expand(3),
        "each": by_step.state()["activation_scale"],
    }
    ends = {}
    for name, scale in scales.items():
        y = plain(straight_through(x, scale[step][:, None], fmt))
        errors = (y - exact).square().sum(dim=1) / exact.square().sum(dim=1)
        ends[name] = bootstrap_ci95(errors)[1]
    assert ends["each"][1] < ends["one"][0] / 10, ends
