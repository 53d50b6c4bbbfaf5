"""Rounding with a gradient: values are the format's, gradients LSQ's."""

from __future__ import annotations

import pytest
import torch

from exporter.formats.fp import Format as Fp
from exporter.formats.int import Format as Int
from exporter.straight_through import straight_through


def test_gradients_are_those_of_lsq():
    fmt, scale = Fp(4, 3), torch.tensor(0.02, requires_grad=True)
    x = torch.linspace(-12, 12, 201, requires_grad=True)  # the range ends at 448 · 0.02 = 8.96
    weights = torch.randn(201, generator=torch.Generator().manual_seed(0))
    (straight_through(x, scale, fmt) * weights).sum().backward()
    units = x.detach() / 0.02
    inside = units.abs() <= 448
    assert torch.equal(x.grad, weights * inside)
    values = fmt.round(units)
    assert float(scale.grad) == pytest.approx(float((weights * (values - units * inside)).sum()), rel=1e-5)
    assert torch.equal(straight_through(x, scale, fmt), values * scale)


def test_the_gradient_of_a_zero_point_is_that_of_lsq_plus():
    """ŷ = s (q − β): beyond the ends q is fixed, so ∂ŷ/∂β = −s; inside it is as good as x, so 0."""
    shift = torch.tensor([[1.0], [-2.0]], requires_grad=True)
    scale, weights = torch.tensor([[0.5], [0.25]]), torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    x = torch.tensor([[-9.0, 0.3, 9.0], [9.0, 0.1, 0.2]])  # beyond, inside, beyond; beyond, inside, inside
    (straight_through(x, scale, Int(4), shift) * weights).sum().backward()
    assert shift.grad.tolist() == [[-0.5 * (1.0 + 4.0)], [-0.25 * 8.0]]


@pytest.mark.parametrize("shift", [None, 0.0])
def test_the_lowest_code_of_integers_is_inside(shift):
    x = torch.tensor([-9.0, -7.8, -7.2, 7.4, 8.0], requires_grad=True)
    given = None if shift is None else torch.tensor(shift)
    found = straight_through(x, torch.tensor(1.0), Int(4), given)
    assert found.tolist() == [-8.0, -8.0, -7.0, 7.0, 7.0]
    found.sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0, 0.0]
