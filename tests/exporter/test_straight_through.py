"""Rounding with a gradient: values are the format's, gradients LSQ's."""

from __future__ import annotations

import pytest
import torch

from exporter.formats.fp import Format as Fp
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
