"""The one table of a graph whose activations have a scale for every sampling step: a row is what one step needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from engines.artifacts import Artifact
from exporter import quantized
from exporter.attention import PointSpec
from exporter.modules import step_unit
from exporter.quantized import Tensors
from exporter.specs import LayerSpec

NAME = "step_table"


@dataclass(frozen=True)
class StepTable:
    """`values` [steps, n] fp32; `columns`: which of them each layer reads, D / unit and, shifted, the shift."""

    values: torch.Tensor
    columns: Mapping[str, tuple[int, ...]]


def step_table(source: Artifact) -> StepTable | None:
    """Returns the table of a Quantized artifact, None where one scale serves all steps; equal columns are one."""
    return table_of(quantized.StoredTensors(source), {**quantized.specs(source), **quantized.points(source)})


def table_of(stored: Tensors, specs: Mapping[str, LayerSpec | PointSpec]) -> StepTable | None:
    """Returns the table of what is stored for layers and points."""
    numbers: dict[bytes, int] = {}
    values: list[torch.Tensor] = []

    def number(column: torch.Tensor) -> int:
        key = column.numpy().tobytes()
        if key not in numbers:
            numbers[key] = len(values)
            values.append(column)
        return numbers[key]

    columns = {}
    for path, spec in specs.items():
        if not spec.steps:
            continue
        scale = stored.raw(f"{path}.activation_scale").float()
        found = [scale / step_unit(scale)]
        if isinstance(spec, LayerSpec) and spec.shifted:
            found.append(stored.raw(f"{path}.activation_shift").float())
        columns[path] = tuple(number(one) for one in found)
    return StepTable(torch.stack(values, dim=1), columns) if columns else None
