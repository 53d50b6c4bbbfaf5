"""Codebooks: `vector_size` consecutive inputs of an output share a code, the number of one of the layer's codewords."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engines.errors import UserError

BITS = {16: 4, 64: 6, 256: 8}  # of a code as stored, by the number of codewords: what packs and survives a build
MAX_VECTOR = 16


@dataclass(frozen=True)
class Format:
    """`codebook_size` codewords of `vector_size` numbers, each tensor's own: 256 × 4 is 2 bits, 64 × 2 is 3.

    Unlike a grid it has no values, no largest one and no rounding: a method finds codewords and codes together.
    """

    vector_size: int
    codebook_size: int

    def __post_init__(self) -> None:
        if self.codebook_size not in BITS or not 1 <= self.vector_size <= MAX_VECTOR:
            raise UserError(
                f"codebook of {self.codebook_size} words of {self.vector_size} numbers",
                fix=f"use codebook_size {', '.join(map(str, BITS))} and vector_size 1 … {MAX_VECTOR}",
            )

    @property
    def bits(self) -> int:
        """Bits per code, as stored; a weight has `bits / vector_size`."""
        return BITS[self.codebook_size]

    @property
    def carrier(self) -> torch.dtype:
        return torch.uint8

    @property
    def onnx_type(self) -> str:
        return "INT8" if self.bits == 8 else "INT4"

    @property
    def native(self) -> bool:
        return False

    @property
    def learned(self) -> bool:
        return True

    @property
    def kind(self) -> str:
        return "codebook"


def of_bits(bits: object, deployable: object = True) -> list[Format]:
    """Returns nothing: how many codewords of what size is not a question of bits alone."""
    return []
