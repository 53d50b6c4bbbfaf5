"""Symmetric integers of 2 to 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engines.errors import UserError


@dataclass(frozen=True)
class Format:
    """Codes −2^(b−1) … 2^(b−1)−1; a range is scaled to 2^(b−1)−1, so that it is symmetric.

    Source: ONNX QuantizeLinear (saturation to the type's ends); methods.md section 1 for the scale.
    """

    bits: int

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UserError(f"int format of {self.bits} bits", fix="use bits = 2 … 8")

    @property
    def max_value(self) -> float:
        return float(2 ** (self.bits - 1) - 1)

    @property
    def carrier(self) -> torch.dtype:
        return torch.int8

    @property
    def onnx_type(self) -> str:
        return "INT4" if self.bits <= 4 else "INT8"

    @property
    def native(self) -> bool:
        return True

    @property
    def values(self) -> torch.Tensor:
        half = 2 ** (self.bits - 1)
        return torch.arange(-half, half).roll(half).float()

    @property
    def learned(self) -> bool:
        return False

    @property
    def kind(self) -> str:
        return "int4" if self.bits <= 4 else "int8"

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        if x.isnan().any():
            raise ValueError("an integer format has no code for NaN")
        return self.round(x).to(torch.int8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.float()

    def round(self, x: torch.Tensor) -> torch.Tensor:
        return x.round().clamp_(-self.max_value - 1, self.max_value)  # torch.round: ties to even, as ONNX


def of_bits(bits: object, deployable: object = True) -> list[Format]:
    """Returns every format of the file with as many bits."""
    return [Format(bits)]  # type: ignore[arg-type]
