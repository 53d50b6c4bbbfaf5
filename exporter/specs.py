"""How one layer is quantized, what its shape allows, and what a recipe's rules may ask about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from engines.errors import UserError
from exporter import formats
from exporter.formats import Format
from exporter.formats.codebook import Format as CodebookFormat
from exporter.tensors import Granularity

FloatLayer = nn.Linear | nn.Conv2d
FLOAT_LAYERS = (nn.Linear, nn.Conv2d)  # what a recipe's rules range over


WARRANTED = 4  # sub-vectors to a codeword, at least. Source: methods.md section 3: K ≤ o · i / d / 4


@dataclass(frozen=True)
class LayerSpec:
    """How one layer is quantized; what the manifest holds of it. `multiplied`: it multiplies its input per channel.

    Its activation has one scale, or `steps` of them, one for every sampling step; `shifted`, it has zero points too.
    Not `deployable`: its formats are simulated, for study; no graph holds them.
    """

    weight: Format
    granularity: Granularity
    block_size: int
    activation: Format | None
    multiplied: bool = False
    deployable: bool = True
    steps: int = 0
    shifted: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "weight": format_json(self.weight),
            "granularity": self.granularity,
            "block_size": self.block_size,
            "activation": format_json(self.activation) if self.activation else None,
            "multiplied": self.multiplied,
            "deployable": self.deployable,
            "steps": self.steps,
            "shifted": self.shifted,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> LayerSpec:
        activation = _format(value["activation"], where) if value["activation"] else None
        weight = _format(value["weight"], where)
        flags = value["multiplied"], value["deployable"], value["steps"], value["shifted"]
        return cls(weight, value["granularity"], value["block_size"], activation, *flags)

    @property
    def kinds(self) -> dict[str, str | None]:
        """The types as reports and plans spell them."""
        return {"weight": self.weight.kind, "activation": self.activation.kind if self.activation else None}

    @property
    def engine_types(self) -> dict[str, str | None]:
        """The types an engine holds the weight in and multiplies.

        Codes that are looked up lie there as integers; activations of fewer bits are INT8 that stay within their ends.
        """
        weight = self.kinds["weight"] if self.weight.native else self.weight.onnx_type.lower()
        activation = "int8" if self.narrow else self.kinds["activation"]
        return {"weight": weight, "activation": activation}

    @property
    def narrow(self) -> bool:
        """Whether the activation has fewer bits than the integers that carry it."""
        return self.activation is not None and self.activation.carrier == torch.int8 and self.activation.bits < 8


def format_json(fmt: Format) -> dict[str, Any]:
    return {"format": type(fmt).__module__.rpartition(".")[2], **vars_of(fmt)}


def _format(value: Mapping[str, Any], where: str) -> Format:
    return formats.load(value["format"], {k: v for k, v in value.items() if k != "format"}, where)


def vars_of(fmt: Format) -> dict[str, Any]:
    return {name: getattr(fmt, name) for name in type(fmt).__dataclass_fields__}  # type: ignore[attr-defined]


def channel_axis(layer: FloatLayer, spec: LayerSpec) -> int:
    """Returns the axis of the codes that channels, or blocks, lie along."""
    if spec.weight.learned:
        return 0
    return int(isinstance(layer, nn.Conv2d) == (spec.granularity == "block"))


def oriented_shape(layer: FloatLayer, spec: LayerSpec) -> tuple[int, ...]:
    """Returns the shape the codes lie in."""
    shape = tuple(layer.weight.shape)
    if isinstance(spec.weight, CodebookFormat):
        return shape[0], math.prod(shape[1:]) // spec.weight.vector_size
    if isinstance(layer, nn.Conv2d):
        return (shape[0], shape[1] * shape[2] * shape[3]) if spec.granularity == "block" else shape
    return shape[::-1]


def oriented(layer: FloatLayer, spec: LayerSpec) -> torch.Tensor:
    """Returns the float weight in the orientation of the codes; those of a codebook stand for its rows [out, n]."""
    weight: torch.Tensor = layer.weight.detach()
    if spec.weight.learned:
        return weight.flatten(1)
    if isinstance(layer, nn.Conv2d):
        return weight.flatten(1) if spec.granularity == "block" else weight
    return weight.T


def check_fits(path: str, layer: FloatLayer, spec: LayerSpec) -> None:
    """Raises a UserError if the layer's width is no multiple of the block size, or its formats do not go together."""
    if isinstance(spec.weight, CodebookFormat):
        _check_codebook(path, layer, spec.weight)
    elif not spec.weight.native and spec.deployable:
        _check_looked_up(path, spec)
    if spec.granularity != "block":
        return
    shape = oriented_shape(layer, spec)
    width = shape[1] if isinstance(layer, nn.Conv2d) else shape[0]
    if width % spec.block_size:
        divisors = [d for d in (16, 32, 64, 128, 256) if width % d == 0]
        raise UserError(
            f"layer {path!r}: its {width} inputs are no multiple of block_size {spec.block_size}",
            fix=f"use block_size {' or '.join(map(str, divisors))}" if divisors else 'use granularity "channel" for it',
        )


def fitting(path: str, layer: FloatLayer, spec: LayerSpec, choices: Sequence[Format]) -> tuple[Format, ...]:
    """Returns the weight formats that the layer can have and an engine multiply; if there is none, raises why.

    A format that stands alone was asked for by name: it may meet any activation.
    """
    found, faults = [], []
    for fmt in choices:
        try:
            check_fits(path, layer, replace(spec, weight=fmt))
        except UserError as error:
            faults.append(error)
        else:
            free = len(choices) == 1 or not spec.activation or not spec.deployable
            if free or fmt.kind.startswith(spec.activation.kind[:2]):  # type: ignore[union-attr]
                found.append(fmt)
    if not found and faults:
        raise faults[0]
    if not found:
        raise UserError(f"layer {path!r}: none of the formats goes with its activations", fix="name one")
    return tuple(found)


def _check_looked_up(path: str, spec: LayerSpec) -> None:
    """Raises a UserError if no graph can hold the table, or no matmul takes what is looked up in it.

    A looked-up weight meets a quantized activation in the activation's type: each of its values must be in that.
    """
    values, activation = spec.weight.values, spec.activation
    if not torch.equal(values.half().float(), values):
        raise UserError(
            f"layer {path!r}: not all values of {spec.weight} exist in fp16, which graphs compute in",
            fix="use at most 4 exponent bits, or E5M2; or study it with deployable = false in the rule",
        )
    if activation is None:
        return
    what = f"layer {path!r}: {spec.weight.kind} weights ({spec.weight}) with {activation.kind} activations"
    if activation.kind != "fp8" or not torch.equal(activation.round(values), values):
        raise UserError(
            f"{what}: not all values of the one exist in the other, so no engine multiplies them",
            fix="use fp8 activations (E4M3) and at most 3 mantissa bits in weights, or float activations",
        )


def _check_codebook(path: str, layer: FloatLayer, fmt: CodebookFormat) -> None:
    """Raises a UserError if sub-vectors do not fill the rows, or codewords are too many for so few of them."""
    rows, width = layer.weight.shape[0], layer.weight[0].numel()
    what = f"layer {path!r}: a codebook of {fmt.codebook_size} × {fmt.vector_size}"
    unit = fmt.vector_size * (2 if fmt.bits == 6 else 1)
    if width % unit:
        why = "codes of 6 bits are stored in pairs" if fmt.bits == 6 else "each code stands for so many"
        raise UserError(
            f"{what}: its rows of {width} weights are no multiple of {unit} ({why})",
            fix="use another vector_size for it, or keep it",
        )
    vectors = rows * width // fmt.vector_size
    if fmt.codebook_size * WARRANTED > vectors:
        raise UserError(
            f"{what} for {vectors} sub-vectors: at least {fmt.codebook_size * WARRANTED} warrant one",
            fix="use a smaller codebook_size, or keep such layers (fewer_weights_than in a rule before this one)",
        )


@dataclass(frozen=True)
class LayerFacts:
    """What a recipe's rules may ask about a layer; `channels` is the fewer of in and out, per group."""

    conv: bool
    channels: int
    grouped: bool
    weights: int


def facts(layer: FloatLayer) -> LayerFacts:
    """Returns what rules may ask about a layer."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    narrow = min(layer.weight.shape[0] // groups, layer.weight.shape[1])
    return LayerFacts(isinstance(layer, nn.Conv2d), narrow, groups > 1, layer.weight.numel())
