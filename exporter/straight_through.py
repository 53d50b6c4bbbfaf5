"""Rounding with a gradient: what training sees of a quantizer."""

from __future__ import annotations

from typing import Any

import torch

from exporter.formats import Format


def straight_through(
    x: torch.Tensor, scale: torch.Tensor, fmt: Format, shift: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns scale · (round(x / scale + shift) − shift), both broadcast; x has the gradient 1 inside, 0 beyond.

    A scale has that of LSQ. Source: Esser et al., arXiv 1902.08153, equation 3, for any format: ∂/∂s = q − x/s inside,
    q beyond. A shift, whole numbers, has −s beyond, as in LSQ+ (Bhalgat et al., arXiv 2004.09576, equation 6).
    """
    found: torch.Tensor = _StraightThrough.apply(x, scale, fmt, shift)  # type: ignore[no-untyped-call]
    return found


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, fmt: Format, shift: torch.Tensor | None
    ) -> torch.Tensor:
        units = x / scale
        low = float(fmt.values.nan_to_num(neginf=0.0).min())  # integers reach one further below zero than above
        values = fmt.round(units) if shift is None else fmt.round(units + shift).sub_(shift)
        codes = units if shift is None else units + shift
        inside = (codes >= low) & (codes <= fmt.max_value)
        error = torch.where(inside, values - units, values) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(inside, error, scale)
        ctx.shift_shape = None if shift is None else shift.shape
        return values.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inside, error, scale = ctx.saved_tensors
        (gradient,) = gradients
        to_x = gradient * inside if ctx.needs_input_grad[0] else None
        to_scale = None if error is None else (gradient * error).sum_to_size(scale.shape)
        to_shift = (gradient * ~inside * -scale).sum_to_size(ctx.shift_shape) if ctx.needs_input_grad[3] else None
        return to_x, to_scale, None, to_shift
