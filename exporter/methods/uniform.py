"""Evenly spaced values, to the nearest, written as a codebook: INT2 and INT3 weights, which no runtime has.

256 codewords of 4 numbers are every combination of 4 values, 64 of 2 every one of 8: codes are integers side by side.
Values lie evenly around zero, −3/2, −1/2, 1/2, 3/2 for 2 bits; the range is searched as `fp_search` does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engines.errors import UserError
from exporter import clustering
from exporter.formats.codebook import Format as CodebookFormat
from exporter.methods import Moments, kmeans
from exporter.observers import CLIPS
from exporter.recipe import WeightSpec
from exporter.tensors import CodebookTensor

NEEDS_CHANNEL_ABSMAX = False
TRAINS = False
CHOOSES_FORMAT = False
CODEBOOKS = True
STEPS = False
POINTS = False
INTEGERS_ONLY = False
factors = kmeans.factors


@dataclass(frozen=True)
class Options:
    """`importance`: errors weigh by E[x²] of the inputs they meet; else alike."""

    importance: bool = True


def needs_moments(options: Options) -> Moments:
    return "diagonal" if options.importance else "none"


def quantize_weight(
    weight: torch.Tensor, spec: WeightSpec, axis: int, options: Options, moments: torch.Tensor | None = None
) -> CodebookTensor:
    fmt = spec.format
    assert isinstance(fmt, CodebookFormat)
    values = evenly_spaced(fmt).to(weight.device)
    importance = kmeans.importance_of(weight, None, moments)
    steps = _steps(weight, values, importance, spec.granularity == "channel")
    words = torch.cartesian_prod(*[values] * fmt.vector_size).reshape(fmt.codebook_size, fmt.vector_size)
    if spec.entries:  # odd integers, which a matmul in FP8 or INT8 takes as they are, and half of the step
        words, steps = 2 * words, steps / 2
        if not torch.equal(spec.entries.round(words), words):
            raise UserError(
                f"uniform: {len(values)} evenly spaced values are not all exact in {spec.entries.kind}",
                fix="use fewer levels to a number, or float activations",
            )
    elif spec.granularity == "tensor":
        return kmeans.stored(words * steps, None, spec, len(weight), lambda stored: _nearest(weight, stored))
    scale = steps.half().float().clamp(min=2.0**-24)  # of a row of zeros: the least that fp16 holds
    codes = _nearest(weight / scale.reshape(-1, 1), words)
    return CodebookTensor(codes.to(fmt.carrier).reshape(len(weight), -1), words, scale, fmt)


def _nearest(rows: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    vectors = rows.reshape(-1, words.shape[1])
    return clustering.assign(vectors, words, torch.ones_like(vectors))  # the nearest in each number


def evenly_spaced(fmt: CodebookFormat) -> torch.Tensor:
    """Returns the values of one number, a step apart around zero; a codebook that is no power of them is refused."""
    count = round(fmt.codebook_size ** (1 / fmt.vector_size))
    if count < 2 or count**fmt.vector_size != fmt.codebook_size:
        raise UserError(
            f"uniform: {fmt.codebook_size} codewords of {fmt.vector_size} numbers are no grid of evenly spaced values",
            fix="use 256 × 4, 256 × 2, 64 × 3, 64 × 2, 16 × 2, or vector_size 1",
        )
    found: torch.Tensor = torch.arange(count) - (count - 1) / 2
    return found


def _steps(weight: torch.Tensor, values: torch.Tensor, importance: torch.Tensor, channels: bool) -> torch.Tensor:
    """Returns the step of least weighted error for every row, [out], or for all, []."""
    rows = weight if channels else weight.reshape(1, -1)
    costs = importance.reshape(rows.shape)
    widest = rows.abs().amax(dim=1).clamp(min=1e-6) / float(values[-1] + 0.5)
    best, least = widest, torch.full_like(widest, torch.inf)
    for share in CLIPS.tolist():
        step = (widest * share)[:, None]
        lowest = float(values[0])
        nearest = ((rows / step - lowest).round() + lowest).clamp(lowest, -lowest) * step
        errors = ((rows - nearest).square() * costs).sum(dim=1)
        best, least = torch.where(errors < least, step[:, 0], best), torch.minimum(errors, least)
    return best if channels else best[0]
