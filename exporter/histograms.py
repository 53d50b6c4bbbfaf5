"""Histograms of the layers that quantization hurts most: weights before and after, inputs beside their range."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from safetensors.torch import load_file
from torch import nn

from engines.artifacts import Artifact, Json
from exporter import quantized, ranges
from exporter.checkpoint import Checkpoint
from exporter.damage import prepared
from exporter.metrics import finite
from exporter.models import Family
from exporter.quantize import reference_feeds, reference_steps
from exporter.specs import LayerSpec, oriented
from exporter.watch import watching

LAYERS = 6  # that are drawn
BINS = 65  # odd, so that zero lies in the middle of one
ROWS = 8  # of each reference feed: a shape needs no more


def worst_layers_histograms(checkpoint: Checkpoint, source: Artifact, rows: Sequence[Json]) -> list[Json]:
    """Returns the histograms of the worst layers, worst first.

    `rows`: a report's errors by layer and step. Weights are those that were quantized, with their factors; inputs are
    the float model's, on the recorded feeds.
    """
    model, specs = prepared(checkpoint, source), quantized.specs(source)
    stored = quantized.StoredTensors(source)
    errors = _by_output(rows, specs)
    worst = dict(sorted(errors.items(), key=lambda item: item[1])[:LAYERS])
    inputs = _input_histograms(model, checkpoint.family, source, list(worst))
    return [
        {
            "layer": path,
            "sqnr_db": finite(value),
            "weight": _weight_histogram(*_weights(model, stored, path, specs[path])),
            "activation": inputs.get(path),
        }
        for path, value in worst.items()
    ]


def _by_output(rows: Sequence[Json], specs: Mapping[str, LayerSpec]) -> dict[str, float]:
    """Returns the lowest SQNR of every quantized layer's output, over runners and steps, in dB."""
    found: dict[str, float] = {}
    for row in rows:
        if (path := row["layer"]) in specs:
            value = math.inf if row["sqnr_db"] is None else row["sqnr_db"]
            found[path] = min(found.get(path, math.inf), -math.inf if row.get("not_finite") else value)
    return found


def _weights(
    model: nn.Module, stored: quantized.StoredTensors, path: str, spec: LayerSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a layer's float weight and what its codes stand for, in the orientation of the codes."""
    layer = model.get_submodule(path)
    made = quantized.load_layer(stored, path, spec, layer)
    return oriented(layer, spec), made.weight_tensor.dequantize()  # type: ignore[arg-type]


def _weight_histogram(before: torch.Tensor, after: torch.Tensor) -> Json:
    end = max(float(before.abs().max()), float(after.abs().max())) or 1.0
    return {"edges": _edges(end), "float": _counts(before, end).tolist(), "quantized": _counts(after, end).tolist()}


def _input_histograms(model: nn.Module, family: Family, source: Artifact, paths: Sequence[str]) -> dict[str, Json]:
    """Returns the float inputs of layers over all reference steps, beside the range chosen for every step.

    A layer whose activation stays float has no range, and none is returned.
    """
    seen = ranges.read(source)
    chosen = {path: seen["layers"][path] for path in paths if path in seen["layers"]}
    ends = {path: max(*row["range"], *row["absmax"], 0.0) or 1.0 for path, row in chosen.items()}
    counts = {path: torch.zeros(BINS) for path in chosen}

    def see(path: str, x: torch.Tensor, _steps: torch.Tensor) -> None:
        counts[path] += _counts(x, ends[path])

    reference = {name: value[:ROWS] for name, value in load_file(source.file(quantized.REFERENCE)).items()}
    rows = family.rows(ROWS)
    with watching(model, family, list(chosen), see) as run:
        for step in reference_steps(reference):
            feeds = reference_feeds(reference, step)
            for first in range(0, len(feeds["step"]), rows):
                run({name: value[first : first + rows] for name, value in feeds.items()})
    return {
        path: {
            "edges": _edges(ends[path]),
            "counts": counts[path].tolist(),
            "range": row["range"],
            "steps": seen["steps"],
        }
        for path, row in chosen.items()
    }


def _edges(end: float) -> list[float]:
    """Returns BINS + 1 edges from −end to end."""
    return torch.linspace(-end, end, BINS + 1, dtype=torch.float64).tolist()


def _counts(values: torch.Tensor, end: float) -> torch.Tensor:
    """Returns how many values lie in each bin; what lies beyond counts in the last one."""
    return torch.histc(values.detach().float().clamp(-end, end), BINS, -end, end)
