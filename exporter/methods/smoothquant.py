"""SmoothQuant: moves activation outliers into the weights, where the factor folds exactly into what comes before.

Source: Xiao et al. 2022, arXiv 2211.10438, equation 4: s_j = max|X_j|^α / max|W_j|^(1−α).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from engines.errors import UserError
from exporter.methods import rtn
from exporter.models import Fold
from exporter.recipe import WeightSpec
from exporter.tensors import QuantizedTensor

NEEDS_CHANNEL_ABSMAX = True
FLOOR = 1e-5  # a channel that is silent in calibration still needs a finite factor (the paper's code uses the same)


@dataclass(frozen=True)
class Options:
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"smoothquant: alpha = {self.alpha}", fix="use 0 … 1; 0.5 balances the two sides")


def prepare(
    model: nn.Module,
    paths: Sequence[str],
    folds: Sequence[Fold],
    channel_absmax: Mapping[str, torch.Tensor],
    options: Options,
) -> list[str]:
    wanted = set(paths)
    changed: list[str] = []
    for fold in folds:
        if not wanted.issuperset(fold.consumers):
            continue  # another rule has one of the consumers: its float input must stay as it is
        consumers = [cast(nn.Linear, model.get_submodule(path)) for path in fold.consumers]
        weight_max = torch.stack([c.weight.detach().abs().amax(dim=0) for c in consumers]).amax(dim=0)
        factor = smoothing_factor(channel_absmax[fold.consumers[0]], weight_max, options.alpha)
        with torch.no_grad():
            for consumer in consumers:
                consumer.weight.mul_(factor)
            fold.divide(model, factor)
        changed += fold.consumers
    return changed


def smoothing_factor(activation_max: torch.Tensor, weight_max: torch.Tensor, alpha: float) -> torch.Tensor:
    """Returns s [in], positive: inputs are divided by it, weight columns multiplied."""
    return activation_max.clamp(min=FLOOR).pow(alpha) / weight_max.clamp(min=FLOOR).pow(1 - alpha)


def quantize_weight(weight: torch.Tensor, spec: WeightSpec, axis: int, options: Options) -> QuantizedTensor:
    return rtn.quantize_weight(weight, spec, axis, rtn.Options())
