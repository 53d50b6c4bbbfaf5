"""The ranges seen in calibration: the largest magnitude per layer and step, beside the range that was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from rich.table import Column, Table

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
        largest = self._largest.setdefault(path, torch.zeros(max(self._steps) + 1, device=x.device))
        if len(x) % len(steps):
            self._untold.add(path)  # rows that no step can be told of, as where a layer reads a table
            return
        rows = x.abs().flatten(1).amax(dim=1).float()
        largest.scatter_reduce_(0, steps.repeat_interleave(len(x) // len(steps)), rows, "amax")

    def share(self, leaders: Mapping[str, str]) -> None:
        """Gives layers what their leaders saw: those read the same."""
        for path, leader in leaders.items():
            self._largest[path] = self._largest[leader]
            if leader in self._untold:
                self._untold.add(path)

    def to_json(self, chosen: Mapping[str, Sequence[float]]) -> Json:
        """Returns the table; `chosen` holds the range of each layer's quantizer at every step."""
        return {
            "steps": self._steps,
            "layers": {
                path: {
                    "range": [chosen[path][s if len(chosen[path]) > 1 else 0] for s in self._steps],
                    "absmax": [float(self._largest[path][s]) for s in self._steps],
                }
                for path in self._largest
                if path not in self._untold
            },
        }


def read(source: Artifact) -> Json:
    """Returns a Quantized artifact's table: steps, and per layer its range and the absmax at each of them."""
    return read_json(source.file(FILE))


def table(ranges: Json, layers: Mapping[str, Json]) -> Table:
    """Returns how each layer is quantized: weight, activation, the range chosen, what was seen, and steps clipped.

    `varies`: the largest magnitude at the step where it is largest, over that where it is least.
    """
    made = Table(
        Column("layer", overflow="fold"), "weight", "activation", "range", "least absmax", "largest absmax",
        "varies", "steps clipped",
    )  # fmt: skip
    for column in made.columns[3:7]:
        column.justify = "right"
    for path, layer in layers.items():
        weight = f"{_spelled(layer['weight'])} per {layer['granularity']}" + f" of {layer['block_size']}" * bool(
            layer["block_size"]
        )
        weight += " (simulated)" * (not layer["deployable"])
        made.add_row(path, weight, activation_of(layer), *_seen(ranges, path))
    return made


def activation_of(layer: Json) -> str:
    """Returns how a layer's activation, or a point of an attention, is quantized, in words.

    Integers of fewer than 8 bits are said to be carried, and multiplied, as INT8.
    """
    if not layer["activation"]:
        return "float"
    found = _spelled(layer["activation"])
    if found.startswith("int") and layer["activation"]["bits"] < 8 and layer.get("deployable", True):
        found += " in INT8"
    if layer["steps"]:
        found += " by step"
    return f"{found}, zero points" if layer.get("shifted") else found


def _spelled(fmt: Json) -> str:
    if fmt["format"] == "fp":
        return f"fp{1 + fmt['exponent_bits'] + fmt['mantissa_bits']} E{fmt['exponent_bits']}M{fmt['mantissa_bits']}"
    if fmt["format"] == "codebook":
        return f"codebook {fmt['codebook_size']}×{fmt['vector_size']}"
    return f"{fmt['format']}{fmt['bits']}"


def _seen(ranges: Json, path: str) -> tuple[str, ...]:
    row = ranges["layers"].get(path)
    if row is None:
        return "", "", "", "", ""
    triples = zip(ranges["steps"], row["absmax"], row["range"], strict=True)
    clipped = [step for step, value, end in triples if value > end]
    least, most = min(row["range"]), max(row["range"])
    chosen = f"{least:.4g}" if least == most else f"{least:.4g} … {most:.4g}"
    low, high = min(row["absmax"]), max(row["absmax"])
    varies = f"{high / low:.1f}×" if low > 0 else ""
    return chosen, f"{low:.4g}", f"{high:.4g}", varies, _spans(clipped) or "–"


def _spans(steps: Sequence[int]) -> str:
    """Writes 0, 1, 2, 7 as 0…2 7."""
    spans: list[list[int]] = []
    for step in steps:
        if spans and step == spans[-1][1] + 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    return " ".join(str(a) if a == b else f"{a}…{b}" for a, b in spans)
