"""A linear layer straight from the codes of its weight: y = x · weightᵀ, in fp16 with sums in fp32, on an NVIDIA GPU.

With few rows the weight is never written out: each program decodes what it multiplies in registers. With many it is
decoded once, into memory that is free again after the call, and multiplied on the tensor cores: decoded tile by tile
inside of that product it took 4 to 13 times as long on an H200 (docs/gpu.md). Needs torch and, to launch, Triton.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

from engines.errors import UserError
from exporter.formats.codebook import Format
from exporter.tensors import CodebookTensor, pack, unpack

FEW_ROWS = 4  # up to here it is faster to decode for every program than once: so at most shapes of DiT-XL/2 on an H200
# Of `many_rows`: rows × outputs up to which a tile is taken → its rows, outputs, inputs, warps, and pipeline stages. Of
# 16 that were tried on an H200 at DiT-XL/2's shapes these are within 18 % of the fastest, on average within 3 %.
TILES = {
    1 << 17: (16, 32, 128, 4, 4), 1 << 19: (64, 32, 128, 4, 4), 3 << 19: (64, 64, 64, 4, 4),
    math.inf: (128, 128, 64, 8, 3),
}  # fmt: skip


@dataclass(frozen=True)
class PackedWeight:
    """`codebook[codes] * scale`, [out, in], with codes as they are stored.

    codes: uint8, what `tensors.pack` makes of [out, in / d]; codebook: fp16 [entries, d]; scale: fp32 [] or [out].
    """

    codes: torch.Tensor
    codebook: torch.Tensor
    scale: torch.Tensor | None
    shape: tuple[int, int]

    @classmethod
    def of(cls, tensor: CodebookTensor) -> PackedWeight:
        """Packs a quantized layer's tensor; its codebook and scale are numbers that fp16 holds."""
        outputs, width = tensor.codes.shape
        scale = None if tensor.scale is None else tensor.scale.float()
        shape = (outputs, width * tensor.codebook.shape[1])
        return cls(pack(tensor.codes, tensor.format), tensor.codebook.half().contiguous(), scale, shape)

    def to(self, device: str | torch.device) -> PackedWeight:
        scale = None if self.scale is None else self.scale.to(device)
        return replace(self, codes=self.codes.to(device), codebook=self.codebook.to(device), scale=scale)

    @property
    def format(self) -> Any:
        """The format of the codes. Raises a UserError where the codebook is of a size that no format has."""
        entries, vector_size = self.codebook.shape
        return Format(vector_size, entries)

    @property
    def width(self) -> int:
        """Codes in a row."""
        return self.shape[1] // self.codebook.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns the weight, [out, in]."""
        like = torch.empty(self.shape[0], self.width, dtype=torch.uint8, device=self.codes.device)
        codes = unpack(self.codes, self.format, like)
        return CodebookTensor(codes, self.codebook, self.scale, self.format).dequantize(dtype)


def codebook_matmul(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Returns x · weightᵀ for fp16 x [..., in], by the kernel for its number of rows."""
    rows = math.prod(x.shape[:-1])
    return few_rows(x, weight) if rows <= FEW_ROWS else many_rows(x, weight)


def few_rows(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Returns x · weightᵀ for fp16 x [..., in] of few rows: a program decodes in registers and holds a sum per row."""
    return _launch("few_rows", x, weight)


def many_rows(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Returns x · weightᵀ for fp16 x [..., in] of many rows: the weight is decoded, then multiplied on tensor cores."""
    return _launch("many_rows", x, weight)


def reference(x: torch.Tensor, weight: PackedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Returns x · weightᵀ as torch computes it in `dtype`, not rounded further."""
    return x.to(dtype) @ weight.dequantize(dtype).T


def disagreement(y: torch.Tensor, x: torch.Tensor, weight: PackedWeight) -> float:
    """Returns the largest |y − exact| over what rounding may make of it: up to 1 is agreement.

    That is half a unit of fp16 in the last place, and √n · 2⁻²³ · Σ |x| |w| for a sum of n products in fp32, tensor
    cores cutting off where others round. Source: Higham and Mary, "A New Approach to Probabilistic Rounding Error
    Analysis", SIAM J. Sci. Comput. 41 (2019): λ √n u, with λ = 1 and twice fp32's u = 2⁻²⁴.
    """
    if not y.numel():
        return 0.0
    exact = reference(x, weight, torch.float64)
    products = x.double().abs() @ weight.dequantize(torch.float64).abs().T
    rounding = exact.abs() * 2.0**-11 + 2.0**-25 + math.sqrt(x.shape[-1]) * 2.0**-23 * products
    return float(((y.double() - exact).abs() / rounding).max())


def constants(kernel: str, weight: PackedWeight, rows: int) -> dict[str, int]:
    """Returns what a kernel is compiled for: the weight's layout, tile sizes, warps and pipeline stages."""
    codes = {"BITS": weight.format.bits, "D": weight.codebook.shape[1]}
    stride = {"SCALE_STRIDE": int(weight.scale is not None and weight.scale.ndim > 0)}
    if kernel == "decode":
        return codes | {"N": 1024 // codes["D"], "num_warps": 4, "num_stages": 1}
    if kernel == "few_rows":  # a code per thread and output: 1152 outputs make 288 programs, two for each SM of an H100
        tile = {"R": _power_of_2(rows), "N": 4, "C": 128, "num_warps": 4, "num_stages": 1}
        return codes | {"WIDTH": weight.width} | stride | tile
    M, N, K, warps, stages = next(tile for most, tile in TILES.items() if rows * weight.shape[0] <= most)
    tile = {"M": M, "N": N, "K": K, "GROUP": 8, "num_warps": warps, "num_stages": stages}
    return {"INPUTS": weight.shape[1]} | stride | tile


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _launch(kernel: str, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Raises a UserError where the kernel cannot run: no Triton, no GPU, or a layout it does not have."""
    _check(x, weight)
    outputs, inputs = weight.shape
    y = x.new_empty(*x.shape[:-1], outputs)
    if not y.numel():
        return y
    flat = x.reshape(-1, inputs).contiguous()
    kernels = _kernels(x.device)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # Triton launches on the current GPU
        options: Any = constants(kernel, weight, len(flat))
        if kernel == "few_rows":
            arguments = flat, weight.codes, weight.codebook, weight.scale, y, len(flat), outputs
            kernels.few_rows[-(-outputs // options["N"]),](*arguments, **options)
        else:
            programs = -(-outputs // options["N"]) * -(-len(flat) // options["M"])
            dense = _decoded(kernels, weight)
            kernels.many_rows[programs,](flat, dense, weight.scale, y, len(flat), outputs, **options)
    return y


def _decoded(kernels: ModuleType, weight: PackedWeight) -> torch.Tensor:
    """Returns the codewords of every code, fp16 [out, in], before the scale."""
    dense = weight.codebook.new_empty(weight.shape)
    count, options = weight.shape[0] * weight.width, constants("decode", weight, 0)
    kernels.decode[-(-count // options["N"]),](weight.codes, weight.codebook, dense, count, **options)
    return dense


def _check(x: torch.Tensor, weight: PackedWeight) -> None:
    vector_size = weight.codebook.shape[1]
    if vector_size & (vector_size - 1):
        raise UserError(
            f"codewords of {vector_size} numbers: Triton's tiles are powers of two",
            fix="use vector_size 1, 2, 4, 8 or 16",
        )
    if x.dtype != torch.float16 or weight.codebook.dtype != torch.float16:
        raise UserError(f"x is {x.dtype}, the codebook {weight.codebook.dtype}", fix="give both in torch.float16")
    if x.shape[-1] != weight.shape[1]:
        raise UserError(
            f"x has {x.shape[-1]} numbers in a row, the weight {weight.shape[1]}", fix="give x [..., in] for [out, in]"
        )


def _kernels(device: torch.device) -> ModuleType:
    """Returns the module of Triton kernels."""
    try:
        from exporter.kernels import _codebook_triton
    except ImportError as error:
        raise UserError(
            f"Triton cannot be imported ({error})", fix="pip install triton (Linux), or use reference()"
        ) from error
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(f"x is on {device.type}", fix='move x and the weight to "cuda", or use reference()')
    return _codebook_triton
