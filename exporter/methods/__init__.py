"""Quantization methods: one module each. A method picks which codes and scales to use.

`factors` may first move magnitudes from activations into weights, without changing what the model computes;
`quantize_weight` then turns one layer's weight into codes and scales.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, cast

import torch
from torch import nn

from engines.errors import UserError, unknown
from exporter import catalog
from exporter.models import Fold
from exporter.tensors import CodebookTensor, QuantizedTensor

LARGEST = 2.0**53  # of an option: the whole numbers up to there are floats too
Moments = Literal["none", "diagonal", "full"]


class Method(Protocol):
    """What a method module holds, beside its frozen `Options`.

    `NEEDS_CHANNEL_ABSMAX` asks for the inputs' largest magnitudes; `CHOOSES_FORMAT`: it takes `WeightSpec.candidates`;
    `TRAINS`: it holds what `Trained` says too, and its options say whether they ask for it (`trains`); `CODEBOOKS`: it
    makes codebooks, and nothing else; `STEPS`: activations may have a scale for every step beside it; `POINTS`: it
    trains those of attentions' products too, `point`; `INTEGERS_ONLY`: its weights are integers with a scale per
    channel or tensor.
    """

    NEEDS_CHANNEL_ABSMAX: bool
    CHOOSES_FORMAT: bool
    TRAINS: bool
    CODEBOOKS: bool
    STEPS: bool
    POINTS: bool
    INTEGERS_ONLY: bool

    def needs_moments(self, options: Any) -> Moments:
        """Returns what `quantize_weight` wants to know of the second moments of the layer's inputs."""

    def factors(
        self,
        model: nn.Module,
        paths: Sequence[str],
        folds: Sequence[Fold],
        channel_absmax: Mapping[str, torch.Tensor],
        options: Any,
    ) -> dict[str, torch.Tensor]:
        """Returns factors as `exporter.scaling` applies them; none leaves the model as it is."""

    def quantize_weight(
        self, weight: torch.Tensor, spec: Any, axis: int, options: Any, moments: torch.Tensor | None = None
    ) -> QuantizedTensor | CodebookTensor:
        """Returns the codes and scales of a weight; `axis` is the one that channels, or blocks, lie along.

        `moments` are E[x xᵀ] of what a row of the weight multiplies, [in, in], or its diagonal, [in].
        """


class Trained(Method, Protocol):
    """A method that trains a block's layers together (`exporter.reconstruct`), from what `quantize_weight` gives.

    Its Options have `rows`, of the calibration set, `batch`, `hold_mb`: what of a block is kept in memory; and `joint`:
    whether all blocks are trained at once.
    """

    def layer(
        self, source: Any, spec: Any, tensor: Any, activation: dict[str, torch.Tensor], options: Any
    ) -> TrainedLayer:
        """Returns the layer that stands in a block while it trains; `activation` is what its input's quantizer holds.

        Layers that read one tensor are given the very same.
        """

    def phases(self, layers: Sequence[Any], options: Any) -> Sequence[Any]:
        """Returns what is trained, one after the other, as `exporter.reconstruct.Phase`s."""


class TrainedLayer(Protocol):
    """A torch module, besides."""

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the buffers that the quantized layer in its place has, and its bias if that was trained."""


def check_whole(method: str, options: Any, **least: int) -> None:
    """Raises a UserError if one of a method's options is no whole number, or is less than what is given here."""
    for key, smallest in least.items():
        value = getattr(options, key)
        if not isinstance(value, int) or value < smallest:
            raise UserError(f"{method}: {key} = {value}", fix=f"write a whole number, at least {smallest}")


# Of a rate in units of what it changes: the whole of it at every iteration.
MOST_RATE = 1.0


def check_rates(method: str, options: Any, *keys: str) -> None:
    """Raises a UserError if a rate in units of what it changes is below 0, or beyond `MOST_RATE`."""
    for key in keys:
        if not 0 <= (value := getattr(options, key)) <= MOST_RATE:
            raise UserError(f"{method}: {key} = {value}", fix=f"write a rate of 0 … {MOST_RATE:g}")


def names() -> list[str]:
    return catalog.modules("methods")


def load(name: str) -> Method:
    return cast(Method, importlib.import_module(f"exporter.methods.{name}"))


def about(name: str) -> list[str]:
    """Returns what a method does, and its options with their defaults."""
    module = importlib.import_module(f"exporter.methods.{name}")
    found = [(module.__doc__ or "").strip().splitlines()[0]]
    defaults = [f"{f.name} = {written(f.default)}" for f in dataclasses.fields(module.Options)]
    return found + ([", ".join(defaults)] if defaults else [])


def written(value: Any) -> str:
    """Returns an option's value as a recipe writes it."""
    return str(value).lower()


def options(name: str, values: Mapping[str, Any], where: str) -> Any:
    """Builds a method's Options from a recipe's table."""
    if name not in names():
        raise unknown("method", name, names(), where)
    cls = importlib.import_module(f"exporter.methods.{name}").Options
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in known:
            raise unknown("key", key, known, where)
        default = known[key].default
        if isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, (int, float)):
            kind = "true or false" if isinstance(default, bool) else "a number"
            shown = written(value) if isinstance(value, bool) else repr(value)
            raise UserError(
                f"{where}: {key} = {shown} is not {kind}", fix=f"write {kind}; the default is {written(default)}"
            )
    try:
        made = cls(**values)  # first: it may know the range that is missed
    except UserError as error:
        raise UserError(f"{where}: {error.what}", fix=error.fix) from error
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(
                f"{where}: {key} = {value!r} is no finite number",
                fix=f"write a number; the default is {written(known[key].default)}",
            )
        if abs(value) > LARGEST:
            raise UserError(
                f"{where}: {key} is beyond {LARGEST:.0e}",
                fix=f"write a number; the default is {written(known[key].default)}",
            )
    return made
