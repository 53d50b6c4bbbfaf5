"""Quantized tensors: codes in a format, times scales per tensor, channel or block.

Scales are positive numbers that fp16 holds exactly, so that every graph, whatever its float type, multiplies by the
same number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from exporter.formats import Format

Granularity = Literal["tensor", "channel", "block"]
GRANULARITIES = ("tensor", "channel", "block")


@dataclass(frozen=True)
class QuantizedTensor:
    """`codes * scale`, along `axis`.

    tensor: scale []. channel: scale [d_axis]. block: scale has codes' shape with d_axis / block_size at `axis`.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    format: Format
    granularity: Granularity
    axis: int
    block_size: int = 0

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns the tensor the codes stand for, in the shape of the codes."""
        values = self.format.decode(self.codes).to(dtype)
        return times_scale(values, self.scale.to(dtype), self.granularity, self.axis, self.block_size)

    def buffers(self) -> dict[str, torch.Tensor]:
        """Returns what a quantized layer holds of it."""
        return {"weight_codes": self.codes.contiguous(), "weight_scale": self.scale}


@dataclass(frozen=True)
class CodebookTensor:
    """`codebook[codes] * scale`: codes [out, n / vector_size], codebook [codebook_size, vector_size], scale [], [out].

    Every number of the codebook and of the scale is one that fp16 holds; no scale is a scale of 1.
    """

    codes: torch.Tensor
    codebook: torch.Tensor
    scale: torch.Tensor | None
    format: Format

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns the tensor the codes stand for, [out, n]."""
        rows = self.codebook.to(dtype)[self.codes.int()].flatten(1)
        if self.scale is None:
            return rows
        return rows * spread(self.scale.to(dtype), rows.shape, "channel" if self.scale.ndim else "tensor", 0, 0)

    def buffers(self) -> dict[str, torch.Tensor]:
        """Returns what a quantized layer holds of it."""
        found = {"weight_codes": self.codes.contiguous(), "weight_codebook": self.codebook}
        return found if self.scale is None else found | {"weight_scale": self.scale}


def times_scale(
    values: torch.Tensor, scale: torch.Tensor, granularity: Granularity, axis: int, block_size: int
) -> torch.Tensor:
    """Returns `values` times the scale of the part that each lies in."""
    if granularity != "block":
        return values * spread(scale, values.shape, granularity, axis, block_size)
    axis %= values.ndim
    parts = values.reshape(*values.shape[:axis], -1, block_size, *values.shape[axis + 1 :])
    return (parts * scale.unsqueeze(axis + 1)).reshape(values.shape)


def spread(
    scale: torch.Tensor, shape: torch.Size, granularity: Granularity, axis: int, block_size: int
) -> torch.Tensor:
    """Returns `scale` in a form that broadcasts over `shape`."""
    if granularity == "tensor":
        return scale
    if granularity == "channel":
        return scale.reshape([-1 if d == axis % len(shape) else 1 for d in range(len(shape))])
    return scale.repeat_interleave(block_size, dim=axis)


def sum_parts(x: torch.Tensor, granularity: Granularity, axis: int, block_size: int) -> torch.Tensor:
    """Returns the sum over every part of `x` that shares a scale, in the scale's shape."""
    if granularity == "tensor":
        return x.sum()
    axis %= x.ndim
    if granularity == "channel":
        return x.sum(dim=[d for d in range(x.ndim) if d != axis])
    return x.reshape(*x.shape[:axis], -1, block_size, *x.shape[axis + 1 :]).sum(dim=axis + 1)


def absmax(x: torch.Tensor, granularity: Granularity, axis: int, block_size: int) -> torch.Tensor:
    """Returns the largest magnitude in every part of `x` that shares a scale, in the scale's shape."""
    if granularity == "tensor":
        return x.abs().amax()
    axis %= x.ndim
    if granularity == "channel":
        return x.abs().amax(dim=[d for d in range(x.ndim) if d != axis])
    shape = (*x.shape[:axis], x.shape[axis] // block_size, block_size, *x.shape[axis + 1 :])
    return x.abs().reshape(shape).amax(dim=axis + 1)


def scale_for(range_: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Returns range / max_value, rounded up to the next fp16 number; a range of zero gets scale 1.

    Rounding up keeps the range's end representable. Below fp16's smallest normal (6.1e-5) the steps widen, but stay
    exact: the codes are computed with the very scale that ships.
    """
    return torch.where(range_ > 0, rounded_up(range_.double() / fmt.max_value), 1.0)


def rounded_up(scale: torch.Tensor) -> torch.Tensor:
    """Returns positive numbers, fp64, as the next fp16 ones, at most the largest; in fp32."""
    scale = scale.clamp(max=65504.0)
    half = scale.to(torch.float16)
    up = torch.nextafter(half, torch.full_like(half, torch.inf))
    return torch.where(half.double() < scale, up, half).clamp(max=65504.0).float()


def quantize(
    x: torch.Tensor, scale: torch.Tensor, fmt: Format, granularity: Granularity, axis: int = 0, block_size: int = 0
) -> QuantizedTensor:
    """Rounds `x / scale` to the nearest codes."""
    codes = fmt.encode(x / spread(scale, x.shape, granularity, axis, block_size))
    return QuantizedTensor(codes, scale, fmt, granularity, axis, block_size)


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Returns the per-tensor quantized `x` in its own type; a half-precision x is divided and rounded in fp32."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    scale = scale.to(wide.dtype)
    return (fmt.round(wide / scale) * scale).to(x.dtype)


def pack(codes: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Returns codes as they are stored: two to a byte in INT4, four 6-bit ones to three bytes, others as they are."""
    if fmt.onnx_type != "INT4":
        return codes.contiguous()
    return pack_int4(codes if fmt.bits <= 4 else _nibbles(codes))


def unpack(packed: torch.Tensor, fmt: Format, like: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack`, in the shape and type of `like`."""
    if fmt.onnx_type != "INT4":
        return packed.to(like.dtype)
    if fmt.bits <= 4:
        return unpack_int4(packed, like)
    first, middle, last = (unpack_int4(packed, like.new_empty(like.numel() // 2 * 3)) ^ 8).reshape(-1, 3).T
    return torch.stack([first << 2 | middle >> 2, (middle & 3) << 4 | last], dim=1).reshape(like.shape)


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Splits every two 6-bit codes, a row's neighbours, into three nibbles, less 8: a graph reads them as signed INT4.

    That is the form of 3 bits that stays compressed in TensorRT-RTX. Source: facts.md section 1.
    """
    first, second = codes.reshape(-1, 2).T
    parts = torch.stack([first >> 2, (first & 3) << 2 | second >> 4, second & 15], dim=1)
    return parts ^ 8


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Packs 4-bit codes, int8 or uint8, two to a byte, the first in the low nibble: ONNX's layout. [ceil(n/2)] uint8.

    Source: ONNX IR specification, "INT4 … first element stored in the 4 LSB".
    """
    flat = codes.flatten().view(torch.uint8) & 0xF
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat[0::2] | (flat[1::2] << 4)


def unpack_int4(packed: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_int4`: codes in the shape and the type, int8 or uint8, of `like`."""
    nibbles = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten()[: like.numel()].reshape(like.shape)
    return nibbles if like.dtype == torch.uint8 else (nibbles ^ 8).to(torch.int8) - 8
