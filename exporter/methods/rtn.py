"""Round to nearest: each scale spans the largest magnitude of its part of the weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from exporter.methods import Moments
from exporter.models import Fold
from exporter.recipe import WeightSpec
from exporter.tensors import QuantizedTensor, absmax, quantize, scale_for

NEEDS_CHANNEL_ABSMAX = False
TRAINS = False
CODEBOOKS = False
STEPS = True
POINTS = False
INTEGERS_ONLY = False
CHOOSES_FORMAT = False


@dataclass(frozen=True)
class Options:
    """None: rounding has nothing to choose."""


def needs_moments(options: Options) -> Moments:
    return "none"


def factors(
    model: nn.Module,
    paths: Sequence[str],
    folds: Sequence[Fold],
    channel_absmax: Mapping[str, torch.Tensor],
    options: Options,
) -> dict[str, torch.Tensor]:
    return {}


def quantize_weight(
    weight: torch.Tensor, spec: WeightSpec, axis: int, options: Options, moments: torch.Tensor | None = None
) -> QuantizedTensor:
    range_ = absmax(weight, spec.granularity, axis, spec.block_size)
    scale = scale_for(range_, spec.format)
    return quantize(weight, scale, spec.format, spec.granularity, axis, spec.block_size)
