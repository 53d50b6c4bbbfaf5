"""QuantizeLinear and DequantizeLinear, emitted while the exporter traces."""

from __future__ import annotations

from typing import Any

import torch


def quantize_dequantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, wide_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Emits Q and DQ with one scale, for an x wider than the graph that scale in its type too.

    The zero point is typed: without one, TensorRT and ONNX assume different types.
    """
    codes = quantize(x, scale if wide_scale is None else wide_scale, zero_point)
    return torch.onnx.ops.symbolic("DequantizeLinear", [codes, scale, zero_point], dtype=scale.dtype, shape=x.shape)


def clip(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Emits Clip between two scalars."""
    return torch.onnx.ops.symbolic("Clip", [x, low, high], dtype=x.dtype, shape=x.shape)


def quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """Emits Q."""
    return torch.onnx.ops.symbolic("QuantizeLinear", [x, scale, zero_point], dtype=zero_point.dtype, shape=x.shape)


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, axis: int, block_size: int
) -> torch.Tensor:
    """Emits DQ of stored codes, per channel along `axis`, or in blocks along it."""
    attributes: dict[str, Any] = {"axis": axis} if scale.ndim else {}
    if block_size:
        attributes["block_size"] = block_size
    inputs = [codes, scale] if zero_point is None else [codes, scale, zero_point]
    return torch.onnx.ops.symbolic("DequantizeLinear", inputs, attributes, dtype=scale.dtype, shape=codes.shape)
