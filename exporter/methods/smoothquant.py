"""SmoothQuant: moves activation outliers into the weights, folded where that is exact, else by a multiply.

Source: Xiao et al. 2022, arXiv 2211.10438, equation 4: s_j = max|X_j|^α / max|W_j|^(1−α).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from engines.errors import UserError
from exporter import scaling
from exporter.methods import Moments, rtn
from exporter.models import Fold
from exporter.modules import float_layer
from exporter.recipe import WeightSpec
from exporter.specs import FloatLayer
from exporter.tensors import QuantizedTensor

NEEDS_CHANNEL_ABSMAX = True
TRAINS = False
CODEBOOKS = False
STEPS = True
POINTS = False
INTEGERS_ONLY = False
CHOOSES_FORMAT = False
FLOOR = 1e-5  # a channel that is silent in calibration still needs a finite factor (the paper's code uses the same)


@dataclass(frozen=True)
class Options:
    """`multiply`: layers whose factor folds nowhere (behind SiLU, GELU, on a skip) multiply their input themselves."""

    alpha: float = 0.5
    multiply: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"smoothquant: alpha = {self.alpha}", fix="use 0 … 1; 0.5 balances the two sides")


def needs_moments(options: Options) -> Moments:
    return "none"


def factors(
    model: nn.Module,
    paths: Sequence[str],
    folds: Sequence[Fold],
    channel_absmax: Mapping[str, torch.Tensor],
    options: Options,
) -> dict[str, torch.Tensor]:
    found = {}
    for group in scaling.groups(paths, folds, multiply=options.multiply):
        largest = torch.stack([channel_weight_max(float_layer(model, path)) for path in group]).amax(dim=0)
        # Readers of one tensor saw the same; those of a joint attention's two halves did not.
        seen = torch.stack([channel_absmax[path] for path in group]).amax(dim=0)
        found[scaling.key(group)] = smoothing_factor(seen, largest, options.alpha)
    return found


def channel_weight_max(layer: FloatLayer) -> torch.Tensor:
    """Returns the largest magnitude that each input channel meets, [in]; each group of a convolution has its own."""
    weight, groups = layer.weight.detach().abs(), getattr(layer, "groups", 1)
    return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1).amax(dim=(1, 3)).flatten()


def smoothing_factor(activation_max: torch.Tensor, weight_max: torch.Tensor, alpha: float) -> torch.Tensor:
    """Returns s [in], positive: inputs are divided by it, weight columns multiplied."""
    return activation_max.clamp(min=FLOOR).pow(alpha) / weight_max.clamp(min=FLOOR).pow(1 - alpha)


def quantize_weight(
    weight: torch.Tensor, spec: WeightSpec, axis: int, options: Options, moments: torch.Tensor | None = None
) -> QuantizedTensor:
    return rtn.quantize_weight(weight, spec, axis, rtn.Options())
