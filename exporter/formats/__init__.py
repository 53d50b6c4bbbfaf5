"""Number formats: one module each, holding a `Format`; the file name is the name used in recipes.

A quantized tensor is `codes * scale`: codes in a format, scales per tensor, channel or block. Scales are positive
numbers that fp16 holds exactly, so that every graph, whatever its float type, multiplies by the same number.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, cast

import torch

from engines.errors import UserError, unknown

Granularity = Literal["tensor", "channel", "block"]
GRANULARITIES = ("tensor", "channel", "block")


class Format(Protocol):
    """A finite set of values, addressed by codes. Frozen dataclasses; their fields are the recipe's keys."""

    @property
    def bits(self) -> int:
        """Bits per code, as stored."""

    @property
    def max_value(self) -> float:
        """The value that the end of a range is scaled to."""

    @property
    def carrier(self) -> torch.dtype:
        """The torch type that holds a code in memory."""

    @property
    def onnx_type(self) -> str | None:
        """The ONNX type that holds the codes (`FLOAT8E4M3FN`, `INT8`, `INT4`), or None if ONNX has none."""

    @property
    def kind(self) -> str:
        """The type as reports and plans spell it: fp8, int8, int4, …"""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the codes of the nearest values, ties to the even code; beyond the range they saturate."""

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Returns the values of codes as fp32."""

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """Returns decode(encode(x)) in x's own type; NaN stays NaN."""


def names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def load(name: str, options: Mapping[str, Any], where: str) -> Format:
    """Builds the format `name` from its options, e.g. `fp` with exponent_bits and mantissa_bits."""
    if name not in names():
        raise unknown("format", name, names(), where)
    cls = importlib.import_module(f"exporter.formats.{name}").Format
    known = [f.name for f in fields(cls)]
    for key in options:
        if key not in known:
            raise unknown("key", key, known, where)
    missing = [key for key in known if key not in options]
    if missing:
        raise UserError(f"{where}: format {name!r} lacks {', '.join(missing)}", fix=f"write {missing[0]} = NUMBER")
    for key, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"{where}: {key} = {value!r} is not a whole number", fix=f"write {key} = NUMBER")
    return cast(Format, cls(**options))


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
        return values * spread(self.scale.to(dtype), values.shape, self.granularity, self.axis, self.block_size)


def spread(
    scale: torch.Tensor, shape: torch.Size, granularity: Granularity, axis: int, block_size: int
) -> torch.Tensor:
    """Returns `scale` in a form that broadcasts over `shape`."""
    if granularity == "tensor":
        return scale
    if granularity == "channel":
        return scale.reshape([-1 if d == axis % len(shape) else 1 for d in range(len(shape))])
    return scale.repeat_interleave(block_size, dim=axis)


def absmax(x: torch.Tensor, granularity: Granularity, axis: int, block_size: int) -> torch.Tensor:
    """Returns the largest magnitude in every part of `x` that shares a scale, in the scale's shape."""
    if granularity == "tensor":
        return x.abs().amax()
    axis %= x.ndim
    if granularity == "channel":
        return x.abs().amax(dim=[d for d in range(x.ndim) if d != axis])
    return x.abs().unflatten(axis, (-1, block_size)).amax(dim=axis + 1)


def scale_for(range_: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Returns range / max_value, rounded up to the next fp16 number; a range of zero gets scale 1.

    Rounding up keeps the range's end representable. Below fp16's smallest normal (6.1e-5) the steps widen, but stay
    exact: the codes are computed with the very scale that ships.
    """
    scale = (range_.double() / fmt.max_value).clamp(max=65504.0)
    half = scale.to(torch.float16)
    up = torch.nextafter(half, torch.full_like(half, torch.inf))
    half = torch.where(half.double() < scale, up, half).clamp(max=65504.0)
    return torch.where(range_ > 0, half.float(), torch.ones_like(half, dtype=torch.float32))


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


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Packs int8 codes −8…7 two to a byte, the first in the low nibble: ONNX's INT4 layout. Returns uint8 [ceil(n/2)].

    Source: ONNX IR specification, "INT4 … first element stored in the 4 LSB".
    """
    flat = codes.flatten().view(torch.uint8) & 0xF
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat[0::2] | (flat[1::2] << 4)


def unpack_int4(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Inverse of `pack_int4`: int8 codes of `shape`."""
    nibbles = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten()[: torch.Size(shape).numel()]
    return ((nibbles ^ 8).to(torch.int8) - 8).reshape(shape)
