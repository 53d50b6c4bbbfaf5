"""Runs the Triton kernels in Triton's interpreter, on CPU tensors: prints the disagreement of every case as JSON.

A process of its own, since TRITON_INTERPRET must be set before Triton is first imported.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from exporter.formats.codebook import Format
from exporter.kernels import codebook
from exporter.tensors import CodebookTensor

PACKINGS = ((256, 4), (64, 2), (16, 1), (16, 2), (64, 16))  # entries, vector_size
# Rows, codes in a row, outputs, scale. Most divide no tile; an odd row of 4-bit codes ends inside a byte, and so does
# an odd number of rows of 158 6-bit ones, which are stored in pairs.
SIZES = (
    ("one row", (1,), 24, 5, None),
    ("one output", (2,), 16, 1, "tensor"),
    ("odd sizes", (3,), 157, 7, "channel"),
    ("batch of rows", (2, 3), 41, 4, "channel"),
    ("more rows than few", (17,), 50, 70, "tensor"),
    ("the large tile", (513,), 17, 130, "channel"),
    ("empty batch", (0,), 24, 5, "channel"),
    ("empty batch of rows", (4, 0), 24, 5, None),
)


def case(entries: int, vector_size: int, rows: tuple[int, ...], width: int, outputs: int, scale: str | None):
    """Returns the disagreement of each kernel, and whether the outputs have the shape they should have."""
    generator = torch.Generator().manual_seed(0)
    width += width % 2 if entries == 64 else 0
    codes = torch.randint(entries, (outputs, width), generator=generator, dtype=torch.uint8)
    values = torch.randn(entries, vector_size, generator=generator).half()
    scales = {None: None, "tensor": torch.tensor(0.25), "channel": torch.rand(outputs, generator=generator) + 0.5}
    fmt = Format(vector_size, entries)
    weight = codebook.PackedWeight.of(CodebookTensor(codes, values, scales[scale], fmt))
    x = torch.randn(*rows[:-1], width * vector_size, rows[-1], generator=generator).half().mT  # not contiguous
    kernels = [codebook.codebook_matmul, codebook.many_rows, *([codebook.few_rows] if sum(rows) < 32 else [])]
    found = {kernel.__name__: kernel(x, weight) for kernel in kernels}
    assert all(y.shape == (*rows, outputs) and y.dtype == torch.float16 for y in found.values())
    return {name: codebook.disagreement(y, x, weight) for name, y in found.items()}


if __name__ == "__main__":
    results = {}
    for entries, vector_size in PACKINGS:
        for name, *sizes in SIZES:
            for kernel, value in case(entries, vector_size, *sizes).items():
                results[f"{kernel}, {entries} × {vector_size}, {name}"] = value
    print(json.dumps(results))
