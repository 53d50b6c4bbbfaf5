"""The ranges seen in calibration: the largest magnitude per layer and step, beside the range that was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from rich.table import Table

from engines.artifacts import Artifact, Json, read_json

FILE = "ranges.json"


class Ranges:
    """Gathers, per layer, the largest magnitude of its input at every step."""

    def __init__(self, steps: Sequence[int]) -> None:
        self._steps = list(steps)
        self._largest: dict[str, torch.Tensor] = {}
        self._untold: set[str] = set()

    def update(self, path: str, x: torch.Tensor, steps: torch.Tensor) -> None:
        """Sees an input whose rows belong to `steps` [n]; several rows of x may belong to one."""
        largest = self._largest.setdefault(path, torch.zeros(max(self._steps) + 1))
        if len(x) % len(steps):
            self._untold.add(path)  # rows that no step can be told of, as where a layer reads a table
            return
        rows = x.abs().flatten(1).amax(dim=1).float()
        largest.scatter_reduce_(0, steps.repeat_interleave(len(x) // len(steps)), rows, "amax")

    def to_json(self, chosen: Mapping[str, float]) -> Json:
        """Returns the table; `chosen` holds the range of each layer's quantizer."""
        return {
            "steps": self._steps,
            "layers": {
                path: {"range": chosen[path], "absmax": [float(self._largest[path][s]) for s in self._steps]}
                for path in self._largest
                if path not in self._untold
            },
        }


def read(source: Artifact) -> Json:
    """Returns a Quantized artifact's table: steps, and per layer its range and the absmax at each of them."""
    return read_json(source.file(FILE))


def table(ranges: Json) -> Table:
    """Returns the ranges as a table: per layer the range chosen, the extremes seen, and the steps clipped."""
    made = Table("layer", "range", "least absmax", "largest absmax", "steps clipped")
    for column in made.columns[1:4]:
        column.justify = "right"
    for path, row in ranges["layers"].items():
        clipped = [step for step, value in zip(ranges["steps"], row["absmax"], strict=True) if value > row["range"]]
        made.add_row(
            path,
            f"{row['range']:.4g}",
            f"{min(row['absmax']):.4g}",
            f"{max(row['absmax']):.4g}",
            _spans(clipped) or "–",
        )
    return made


def _spans(steps: Sequence[int]) -> str:
    """Writes 0, 1, 2, 7 as 0…2 7."""
    spans: list[list[int]] = []
    for step in steps:
        if spans and step == spans[-1][1] + 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    return " ".join(str(a) if a == b else f"{a}…{b}" for a, b in spans)
