"""Model families: one module per denoiser class. Nothing outside this package knows one model from another.

A family says how its class is built, which inputs it takes, which of their axes are dynamic, what its blocks are,
where a per-channel factor folds exactly, and how a sampler drives it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import nn

from engines.errors import UserError
from exporter import catalog

Config = Mapping[str, Any]


@dataclass(frozen=True)
class InputSpec:
    """One input of the network; a string in `shape` names a dynamic axis."""

    name: str
    dtype: str  # "float" (the graph's own float type), "int64"
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Fold:
    """Layers that read the same tensor, and the parameters before it that can divide it per channel, exactly.

    Each part is (path of a Linear, its output rows, what they produce): `scale` rows produce g in x·(1 + g), the
    others produce the tensor, or a term of it, itself.
    """

    consumers: tuple[str, ...]
    parts: tuple[tuple[str, slice, str], ...]

    def divide(self, model: nn.Module, factor: torch.Tensor) -> None:
        """Divides what the consumers read by `factor` [channels].

        Source: methods.md section 2, "Where 1/s goes": W_g/s, (b_g + 1)/s − 1, W_h/s, b_h/s.
        """
        for path, rows, role in self.parts:
            linear = cast(nn.Linear, model.get_submodule(path))
            linear.weight[rows] /= factor[:, None]
            one = 1.0 if role == "scale" else 0.0
            linear.bias[rows] = (linear.bias[rows] + one) / factor - one


class Family(Protocol):
    """What a family module holds; `CLASS` is the diffusers class it serves, `OUTPUT` its output's name."""

    CLASS: str
    OUTPUT: str

    def build(self, config: Config) -> nn.Module: ...

    def inputs(self, config: Config) -> tuple[InputSpec, ...]: ...

    def blocks(self, model: nn.Module) -> list[str]:
        """Returns the paths of the blocks, in the order they run."""

    def folds(self, model: nn.Module) -> list[Fold]: ...

    def latent_shape(self, config: Config) -> tuple[int, ...]:
        """Returns the shape of one sample's latent, without the batch axis."""

    def conditions(self, config: Config, indices: Sequence[int], *, null: bool = False) -> dict[str, torch.Tensor]:
        """Returns the conditioning inputs of samples, or with `null` those of guidance's unconditional half."""

    def feeds(
        self, latent: torch.Tensor, timestep: torch.Tensor, conditions: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]: ...

    def prediction(self, config: Config, output: torch.Tensor) -> torch.Tensor:
        """Returns the part of the output that the scheduler steps with (a learned variance is dropped)."""

    def call(self, model: nn.Module, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor: ...

    def labels(self, config: Config, indices: Sequence[int]) -> torch.Tensor | None:
        """Returns the class that each sample was asked to show, for the task score."""


def families() -> list[str]:
    return catalog.modules("models")


def family_of(class_name: str, where: str) -> Family:
    """Returns the family that serves a diffusers class."""
    known = {}
    for name in families():
        family = cast(Family, importlib.import_module(f"exporter.models.{name}"))
        if class_name == family.CLASS:
            return family
        known[family.CLASS] = name
    raise UserError(
        f"{where}: its class is {class_name!r}, which no model family serves",
        fix=f"known classes: {', '.join(known)}; a family is one file in exporter/models",
    )
