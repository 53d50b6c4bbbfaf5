"""What a recipe's formats promise of sizes, before there is a single code: of the quantized model, of its graphs.

The quantized module is built as the stages build it, without memory, and its tensors are added up as they are stored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from exporter import quantized
from exporter.attention import PointSpec
from exporter.lower.trace import TORCH_TYPES, default_dtype
from exporter.models import Family
from exporter.modules import DERIVED, SplitConv2d
from exporter.plan import Plan
from exporter.specs import LayerSpec

CODES = "weight_codes"
HALVES = ("_scale", "_codebook", "input_multiplier")  # numbers of ours that fp16 holds
UNFED = ("activation_scale", "activation_shift")  # of a step: the graph has a table of them
WORD = 4  # bytes of fp32


@dataclass(frozen=True)
class Held:
    """Bytes of a quantized model as stored: all, those of quantized layers' weights, and how many weights those are."""

    bytes: int
    weight_bytes: int
    weights: int

    @property
    def bits_per_weight(self) -> float | None:
        return 8 * self.weight_bytes / self.weights if self.weights else None


def calibrated(plan: Plan, family: Family, model: nn.Module, steps: int) -> Plan:
    """Returns the plan as calibration will leave it: which activations have a scale for every step, what multiplies.

    An observer that chooses a format chooses one of as many bits, so no size depends on it. `model` is the one that
    was planned.
    """
    specs = {path: _stepped(plan, path, spec, steps) for path, spec in plan.specs.items()}
    points = {
        path: PointSpec(rule.format, steps if rule.granularity == "step" else 0) for path, rule in plan.products.items()
    }
    found = replace(plan, specs=specs, points=points)
    smoothed = [path for path in specs if plan.method(path)[0].NEEDS_CHANNEL_ABSMAX]
    if not smoothed:
        return found
    folded = {path for fold in family.folds(model) for path in fold.consumers if {*fold.consumers} <= {*smoothed}}
    alone = [path for path in smoothed if path not in folded and plan.method(path)[1].multiply]
    return found.multiplying(alone)


def _stepped(plan: Plan, path: str, spec: LayerSpec, steps: int) -> LayerSpec:
    activation = plan.rules[path].activation
    if activation is None or activation.granularity != "step":
        return spec
    return replace(spec, steps=steps, shifted=activation.zero_point)


def on_meta(family: Family, plan: Plan, dtype: torch.dtype) -> nn.Module:
    """Builds the quantized module to be looked at, not run: faster than fake tensors."""
    with default_dtype(dtype), torch.device("meta"):
        return quantized.assemble(family, plan.splits, plan.specs, plan.points)


def stored(family: Family, plan: Plan, halves: Collection[str]) -> Held:
    """Returns what the quantized model stores; `halves` are the tensors that the checkpoint has in fp16."""
    model = on_meta(family, plan, torch.float32)
    layers = quantized.quantized_layers(model)
    total = weight_bytes = 0
    for name, tensor in _tensors(model).items():
        owner, _, leaf = name.rpartition(".")
        size = _stored_bytes(name, tensor, layers.get(owner), halves)
        total += size
        weight_bytes += size if owner in layers and leaf in quantized.STORED else 0
    weights = sum(torch.Size(layer.weight_shape).numel() for layer in layers.values())
    return Held(total, weight_bytes, weights)


def _stored_bytes(name: str, tensor: torch.Tensor, layer: Any, halves: Collection[str]) -> int:
    """As `exporter.quantized.stored_tensors`."""
    leaf = name.rpartition(".")[2]
    if leaf in DERIVED:
        return 0
    if layer is not None and leaf == CODES:
        return code_bytes(tensor, layer.spec)
    narrow = name in halves or (layer is not None and leaf.endswith(HALVES))
    return tensor.numel() * 2 if narrow and tensor.dtype == torch.float32 else tensor.nbytes


def code_bytes(codes: torch.Tensor, spec: LayerSpec) -> int:
    """Returns what codes take once packed."""
    bits = spec.weight.bits if spec.weight.learned else 4 if spec.weight.onnx_type == "INT4" else 8
    return -(-codes.numel() * bits // 8)


def graph_bytes(family: Family, plan: Plan, dtype: str) -> int:
    """Returns the bytes of a graph's initializers in float type `dtype`."""
    model = on_meta(family, plan, TORCH_TYPES[dtype])
    layers = quantized.quantized_layers(model)
    total, tables = 0, set()
    for name, tensor in _tensors(model).items():
        owner, _, leaf = name.rpartition(".")
        layer = layers.get(owner)
        if leaf in UNFED and _steps(plan, owner):
            continue
        if leaf == "weight_table":
            tables.add((layer.spec.weight if layer else None, tensor.nbytes))  # equal ones lie in a graph once
        elif layer is not None and leaf == CODES:
            total += code_bytes(tensor, layer.spec)
        else:
            total += tensor.nbytes
    return total + sum(size for _, size in tables) + _table_bytes(plan)


def _steps(plan: Plan, path: str) -> int:
    spec: LayerSpec | PointSpec | None = plan.specs.get(path) or plan.points.get(path)
    return spec.steps if spec else 0


def _table_bytes(plan: Plan) -> int:
    """Returns the bytes of the one table of steps: a column for all layers that read one tensor, or two, shifted."""
    columns = sum((2 if spec.shifted else 1) * spec.steps for spec in plan.specs.values())
    return WORD * (columns + sum(spec.steps for spec in plan.points.values()))


def _tensors(model: nn.Module) -> Mapping[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def macs_of(path: str, model: nn.Module, macs: Mapping[str, int]) -> int:
    """Returns a planned layer's share of what was counted in the model before its convolutions were split."""
    if path in macs:
        return macs[path]
    owner = path.rpartition(".")[0]
    split = model.get_submodule(owner)
    assert isinstance(split, SplitConv2d), path
    widths = {"hidden": split.hidden.in_channels, "skip": split.skip.in_channels}
    return macs.get(owner, 0) * widths[path.rpartition(".")[2]] // sum(widths.values())
