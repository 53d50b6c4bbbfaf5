"""Per-channel factors that move from activations into weights: folded where that is exact, else an explicit multiply.

A set of factors maps the paths of the layers that share an input, joined by "+", to s [in]: those layers' weights are
multiplied by s along their inputs, and what they read is divided by it. The model computes what it did before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from calib_data.tensors import save_tensors
from exporter.models import Fold
from exporter.modules import float_layer, multiply_input

if TYPE_CHECKING:
    from rich.table import Table

FILE = "factors.safetensors"
# Multipliers ship as fp16, so that every graph multiplies by the same number: its normal range bounds them.
LEAST, MOST = 2.0**-14, 65504.0

Factors = Mapping[str, torch.Tensor]


def key(paths: Sequence[str]) -> str:
    return "+".join(paths)


def groups(paths: Sequence[str], folds: Sequence[Fold], *, multiply: bool) -> list[tuple[str, ...]]:
    """Returns the layers among `paths` that get a factor together: readers of a fold; with `multiply`, others alone."""
    wanted = dict.fromkeys(paths)
    # A fold needs all its readers: where another rule has one of them, its float input must stay as it is.
    found = [fold.consumers for fold in folds if wanted.keys() >= set(fold.consumers)]
    for group in found:
        for path in group:
            del wanted[path]
    return found + [(path,) for path in wanted] if multiply else found


def apply(model: nn.Module, folds: Sequence[Fold], factors: Factors) -> list[str]:
    """Applies factors to a float model in place; returns the layers that multiply their own input."""
    known = {key(fold.consumers): fold for fold in folds}
    explicit = []
    with torch.no_grad():
        for paths, factor in factors.items():
            fold = known.get(paths)
            if fold is None:
                multiplier = (1 / factor).clamp(LEAST, MOST).half().float()
                factor = 1 / multiplier
                multiply_input(float_layer(model, paths), multiplier)
                explicit.append(paths)
            for path in paths.split("+"):
                layer = float_layer(model, path)
                # a convolution in groups has its own inputs for each part of its outputs
                groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
                parts = layer.weight.view(groups, -1, *layer.weight.shape[1:])
                parts.mul_(factor.reshape(groups, 1, -1, *[1] * (layer.weight.ndim - 2)))
            if fold is not None:
                fold.divide(model, factor)
    return explicit


def summary(factor: torch.Tensor) -> dict[str, float]:
    """Returns the share of channels that a factor changes, and its median."""
    return {"changed": float((factor != 1).float().mean()), "median": float(factor.median())}


def table(summaries: Mapping[str, Mapping[str, float]]) -> Table:
    """Returns what was moved from activations into weights: layers that read one tensor in one row."""
    from rich.table import Column, Table

    made = Table(Column("layers", overflow="fold"), "channels changed", "median factor")
    made.title = "factors moved from activations into weights"
    for paths, found in summaries.items():
        first, *others = paths.split("+")
        names = [first, *(path.rpartition(".")[2] for path in others)]
        made.add_row(", ".join(names), f"{100 * found['changed']:.0f} %", f"{found['median']:.3g}")
    return made


def save(factors: Factors, folder: Path) -> None:
    if factors:
        save_tensors(dict(factors), folder / FILE)
