"""Rounding with a gradient: what training sees of a quantizer."""

from __future__ import annotations

from typing import Any

import torch

from exporter.formats import Format


def straight_through(x: torch.Tensor, scale: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Returns scale · round(x / scale), [] or broadcast; x has the gradient 1 inside the range and 0 beyond.

    A scale [] has that of LSQ. Source: Esser et al., arXiv 1902.08153, equation 3, for any format: ∂/∂s = q − x/s
    inside, q beyond.
    """
    found: torch.Tensor = _StraightThrough.apply(x, scale, fmt)  # type: ignore[no-untyped-call]
    return found


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, fmt: Format) -> torch.Tensor:
        units = x / scale
        values = fmt.round(units)
        inside = units.abs() <= fmt.max_value
        error = torch.where(inside, values - units, values) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(inside, error)
        return values.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inside, error = ctx.saved_tensors
        (gradient,) = gradients
        to_x = gradient * inside if ctx.needs_input_grad[0] else None
        return to_x, None if error is None else (gradient * error).sum(), None
