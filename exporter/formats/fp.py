"""Low-bit floating point: a sign, E exponent bits and M mantissa bits, at most 8 bits in all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from engines.errors import UserError

# Splits that torch and ONNX hold natively: their carrier, their ONNX type, and their first code that is not a number.
# Source: ONNX "Float stored in 8 bits"; OCP 8-bit Floating Point Specification 1.0, section 5.
NATIVE = {
    (4, 3): (torch.float8_e4m3fn, "FLOAT8E4M3FN", 0x7F),  # the FN kind: no infinity, one NaN per sign
    (5, 2): (torch.float8_e5m2, "FLOAT8E5M2", 0x7C),  # as IEEE: 0x7C is infinity, above it NaN
}

# The exponent's bits of a float type, the integer type that shows them, and how many places its mantissa has.
_LAYOUT = {
    torch.float32: (0x7F800000, torch.int32, 23),
    torch.float64: (0x7FF0000000000000, torch.int64, 52),
}


@dataclass(frozen=True)
class Format:
    """Values (−1)^s · 2^(e−bias) · 1.m, subnormals at e = 0, bias 2^(E−1)−1; with 6 or 7 exponent bits 2^E−16.

    That keeps the largest value below 2^16, so that fp16 holds the scales of these too: a scale moves any bias.
    Every code of a split other than E4M3 and E5M2 is a number: there are no infinities and no NaN, as in OCP's
    E2M1 and E3M2. A code is sign, exponent, mantissa from the highest bit down.
    """

    exponent_bits: int
    mantissa_bits: int

    def __post_init__(self) -> None:
        if self.exponent_bits < 1 or self.mantissa_bits < 0 or not 2 <= self.bits <= 8:
            raise UserError(
                f"fp format with {self.exponent_bits} exponent and {self.mantissa_bits} mantissa bits",
                fix="use exponent_bits ≥ 1 and mantissa_bits ≥ 0 with at most 7 together",
            )

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        return max(
            int(2 ** (self.exponent_bits - 1)) - 1, int(2**self.exponent_bits) - 16 if self.exponent_bits > 5 else 0
        )

    @property
    def carrier(self) -> torch.dtype:
        return NATIVE[key][0] if (key := (self.exponent_bits, self.mantissa_bits)) in NATIVE else torch.uint8

    @property
    def onnx_type(self) -> str:
        if self.native:
            return NATIVE[self.exponent_bits, self.mantissa_bits][1]
        return "INT4" if self.bits <= 4 else "INT8"

    @property
    def native(self) -> bool:
        return (self.exponent_bits, self.mantissa_bits) in NATIVE

    @property
    def learned(self) -> bool:
        return False

    @property
    def kind(self) -> str:
        """fp8 is E4M3, the one that matmuls take."""
        if self.bits == 8 and (self.exponent_bits, self.mantissa_bits) != (4, 3):
            return f"fp8_e{self.exponent_bits}m{self.mantissa_bits}"
        return f"fp{self.bits}"

    @cached_property
    def values(self) -> torch.Tensor:
        """The value of every code, fp32 [2^bits]; NaN and infinities where the format has them."""
        codes = torch.arange(2**self.bits)
        mantissa = codes & (2**self.mantissa_bits - 1)
        exponent = (codes >> self.mantissa_bits) & (2**self.exponent_bits - 1)
        fraction = mantissa / 2**self.mantissa_bits + (exponent > 0)
        magnitude = torch.ldexp(fraction, exponent.clamp(min=1) - self.bias).float()
        low = codes & (2 ** (self.bits - 1) - 1)
        magnitude[low > self._last_code] = torch.nan
        if (self.exponent_bits, self.mantissa_bits) == (5, 2):
            magnitude[low == 0x7C] = torch.inf
        return torch.where(codes >= 2 ** (self.bits - 1), -magnitude, magnitude)

    @property
    def _last_code(self) -> int:
        """The code of the largest number."""
        native = NATIVE.get((self.exponent_bits, self.mantissa_bits))
        return (native[2] if native else 2 ** (self.bits - 1)) - 1

    @cached_property
    def max_value(self) -> float:
        return float(self.values[self._last_code])

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        rounded = self.round(x).float()
        magnitude = rounded.abs()
        _, exponent = torch.frexp(magnitude)  # magnitude = f · 2^exponent, f in [0.5, 1)
        exponent = torch.where(magnitude > 0, exponent - 1 + self.bias, 0).clamp_(
            min=1
        )  # subnormals share e = 1's step
        step = torch.ldexp(torch.ones_like(magnitude), exponent - self.bias - self.mantissa_bits)
        units = (magnitude / step).nan_to_num_(0.0).to(torch.int32)  # the mantissa, with its leading one if normal
        code = units + ((exponent - 1) << self.mantissa_bits)
        code += torch.signbit(rounded).to(torch.int32) << (self.bits - 1)
        if x.isnan().any():
            if not self.native:
                raise ValueError(f"{self.kind} (E{self.exponent_bits}M{self.mantissa_bits}) has no code for NaN")
            sign = torch.signbit(x).to(torch.int32) << 7
            code = torch.where(x.isnan(), sign | 0x7F, code)
        return code.to(torch.uint8).view(self.carrier)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        if codes.dtype == torch.uint8:
            return self.values.to(codes.device)[codes.int()]
        return codes.float()

    def round(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype in (torch.float16, torch.bfloat16):  # E6 and E5M0 reach beyond fp16
            return self.round(x.float()).to(x.dtype)
        # x + m − m rounds to the last place of m, ties to even: m is 1.5 · 2^23 (2^52 in fp64) steps of x's binade. Any
        # logarithm would be off for some x: facts.md section 5.
        exponent_bits, integers, places = _LAYOUT[x.dtype]
        x = x.clamp(-self.max_value, self.max_value)
        binade = (x.view(integers) & exponent_bits).view(x.dtype).clamp_(min=2.0 ** (1 - self.bias))
        magic = binade * (1.5 * 2.0 ** (places - self.mantissa_bits))
        rounded = (x + magic).sub_(magic)
        if self.mantissa_bits == 0:  # codes are exponents: 1.5 units lie between codes e and e + 1, and ties go to even
            _, exponent = torch.frexp(binade)
            tie = (x.abs() == 1.5 * binade) & ((exponent - 1 + self.bias) % 2 == 0)
            rounded = torch.where(tie, binade.copysign(x), rounded)
        return rounded.clamp_(-self.max_value, self.max_value).copysign_(x)


def of_bits(bits: int, deployable: bool = True) -> list[Format]:
    """Returns every split of as many bits; for engines all but E5M2, of which TensorRT takes no weights."""
    splits = ((exponent, bits - 1 - exponent) for exponent in range(1, bits))  # the first of too many bits is refused
    return [Format(*split) for split in splits if split != (5, 2) or not deployable]
