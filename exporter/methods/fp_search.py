"""Searches a weight's ranges, and where the recipe leaves it open its format too, for the least error.

Every candidate format is tried with every clip; the error is the weight's own, or that of the layer's output over the
calibration inputs. Source: methods.md section 1, "Search", after FP8-quantization (Kuzmin et al., arXiv 2208.09225) and
LLM-FP4 (Liu et al., arXiv 2310.16836): 111 clips evenly over 0.1 … 1.2 of the largest magnitude, one split to a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from exporter.formats import Format
from exporter.methods import Moments, rtn
from exporter.observers import CLIPS
from exporter.recipe import WeightSpec
from exporter.tensors import QuantizedTensor, absmax, quantize, scale_for, spread, sum_parts

NEEDS_CHANNEL_ABSMAX = False
TRAINS = False
CODEBOOKS = False
STEPS = True
POINTS = False
INTEGERS_ONLY = False
CHOOSES_FORMAT = True
factors = rtn.factors


@dataclass(frozen=True)
class Options:
    """`output`: score by the layer's output instead of the weight (convolutions in groups always by their weight).

    `vote`: each channel has one vote for the format, as in the papers; else the least error over all channels wins.
    """

    output: bool = True
    vote: bool = False


def needs_moments(options: Options) -> Moments:
    return "full" if options.output else "none"


def quantize_weight(
    weight: torch.Tensor, spec: WeightSpec, axis: int, options: Options, moments: torch.Tensor | None = None
) -> QuantizedTensor:
    searched = [best_ranges(weight, spec, fmt, axis, moments) for fmt in spec.choices]
    errors = torch.stack([error.flatten() for error, _ in searched])  # [formats, parts]
    chosen = int(errors.argmin(dim=0).mode().values) if options.vote else int(errors.sum(dim=1).argmin())
    fmt, scale = spec.choices[chosen], searched[chosen][1]
    return quantize(weight, scale, fmt, spec.granularity, axis, spec.block_size)


def best_ranges(
    weight: torch.Tensor, spec: WeightSpec, fmt: Format, axis: int, moments: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the least error of every part that has a scale of its own, and those scales, both in the scale's shape.

    Round to nearest, which clips nothing, is among what is tried: no part ends worse than it.
    """
    largest = absmax(weight, spec.granularity, axis, spec.block_size)
    best = torch.full_like(largest, torch.inf, dtype=torch.float64)
    scales = torch.ones_like(largest)
    for clip in (1.0, *CLIPS.tolist()):
        scale = scale_for(largest * clip, fmt)
        steps = spread(scale, weight.shape, spec.granularity, axis, spec.block_size)
        error = part_errors(fmt.round(weight / steps) * steps - weight, spec, axis, moments)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, scale, scales)
    return best, scales


def part_errors(delta: torch.Tensor, spec: WeightSpec, axis: int, moments: torch.Tensor | None) -> torch.Tensor:
    """Returns the error of every part with a scale of its own, in the scale's shape, fp64.

    With the inputs' second moments E[x xᵀ], [in, in], it is that of the output, E[(δ·x)²]; blocks along the inputs
    share an output, so theirs counts the moments' diagonal alone.
    """
    if moments is None:
        return sum_parts(delta.double().square(), spec.granularity, axis, spec.block_size)
    outputs = 1 - axis if spec.granularity == "block" else axis
    rows = delta.movedim(outputs, 0).flatten(1)  # [out, in]
    if spec.granularity == "block":
        squares = (rows.square() * moments.diagonal()).reshape(delta.movedim(outputs, 0).shape).movedim(0, outputs)
    else:
        squares = ((rows @ moments) * rows).reshape(delta.movedim(outputs, 0).shape).movedim(0, outputs)
    return sum_parts(squares.double(), spec.granularity, axis, spec.block_size)
