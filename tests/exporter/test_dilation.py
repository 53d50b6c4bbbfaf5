"""Dilation: channels grow as far as no output's range does, and the model computes what it did."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from exporter import scaling
from exporter.dilation import MOST, dilation
from exporter.modules import float_layer
from exporter.tensors import absmax


def grown(weight, factor, groups=1):
    parts = weight.reshape(groups, -1, *weight.shape[1:])
    return (parts * factor.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))).reshape(weight.shape)


@pytest.mark.parametrize(("shape", "groups"), [((24, 16), 1), ((8, 6, 3, 3), 1), ((12, 4, 3, 3), 3), ((9, 1, 3, 3), 9)])
def test_no_output_channels_range_grows_and_every_factor_is_as_large_as_that_lets_it(shape, groups):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    factor = dilation(weight, groups)
    assert factor.shape == (shape[1] * groups,)
    assert (factor >= 1).all()
    before, after = (absmax(w, "channel", 0, 0) for w in (weight, grown(weight, factor, groups)))
    assert torch.allclose(before, after, rtol=1e-6)
    for k in range(len(factor)):  # a little more of any one of them, and some range would grow
        more = factor.clone()
        more[k] *= 1.01
        assert (absmax(grown(weight, more, groups), "channel", 0, 0) > before * 1.001).any(), k


def test_both_ends_of_the_range_hold_where_the_quantizer_is_asymmetric():
    weight = torch.randn(10, 12, generator=torch.Generator().manual_seed(1)) + 0.3
    factor = dilation(weight, symmetric=False)
    for pick in (torch.amin, torch.amax):
        assert torch.allclose(pick(weight, dim=1), pick(weight * factor, dim=1), rtol=1e-6)
    assert (factor <= dilation(weight)).all()  # the symmetric form has the more room
    assert (factor < dilation(weight)).any()


def test_of_a_whole_tensors_range_channels_have_more_room():
    weight = torch.randn(10, 12, generator=torch.Generator().manual_seed(2))
    factor = dilation(weight, per_tensor=True)
    assert (factor >= dilation(weight)).all()
    assert float((weight * factor).abs().max()) == pytest.approx(float(weight.abs().max()), rel=1e-6)


def test_dead_channels_ties_and_hardly_used_ones():
    weight = torch.tensor([[1.0, 0.0, 1.0, 1e-9, 0.5], [0.0, 0.0, 0.0, 0.0, 0.0], [2.0, 0.0, -1.0, 0.0, 2.0 - 1e-5]])
    assert dilation(weight).tolist() == [1.0, 1.0, 1.0, MOST, 1.0]


@pytest.mark.parametrize("groups", [1, 4])
def test_the_model_computes_what_it_did(groups):
    torch.manual_seed(0)
    model = nn.Sequential(nn.SiLU(), nn.Conv2d(8, 12, 3, padding=1, groups=groups)).requires_grad_(False)
    x = torch.randn(2, 8, 5, 5)
    before, weight = model(x), model[1].weight.clone()
    factor = dilation(weight, groups)
    assert scaling.apply(model, [], {"1": factor}) == ["1"]
    assert not torch.equal(float_layer(model, "1").weight, weight)
    assert torch.allclose(model(x), before, rtol=1e-5, atol=1e-6)  # fp32 products of other factors
