"""Measures, layer by layer, how much ranges vary over the sampling steps, and what a scale for every step is worth.

    python tools/measure_step_ranges.py digits-dit shapes-unet

Ranges are taken from one calibration set, errors from another of other noise: every layer's float weight multiplies its
input as it is, rounded with one scale, and rounded with its step's. An error is a trajectory's squared error of the
layer's output over the output's square, at each step, and their mean over steps; intervals are over trajectories.
Writes JSON into --results and tables between the marks in --document.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import compare_methods as compare
import torch
from compare_report import apart, put_between
from torch import nn

from calib_data.store import CalibrationSet
from engines.artifacts import Json, read_json, write_json
from exporter import modules
from exporter.activations import observe
from exporter.calibrate import calibrate
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.metrics import bootstrap_ci95
from exporter.plan import Plan, plan_layers
from exporter.straight_through import straight_through
from exporter.watch import watch_by_step

BEGIN, END = "<!-- measure_step_ranges: begin -->", "<!-- measure_step_ranges: end -->"
VARIES = 2.0  # times, from the step where a layer's largest input is least to where it is largest: the project's bar
WAYS = {"one": "one-scale", "each": "by-step"}
SETTINGS = {8: "w8a8", 4: "w4a4"}  # activation bits; weights stay float


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--samples", default=128, show_default=True, help="trajectories that ranges are taken from")
@click.option("--held-out", default=64, show_default=True, help="trajectories that errors are taken from")
@click.option("--seed", default=0, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("out/compare"), show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=Path("docs/steps"), show_default=True)
@click.option("--document", type=click.Path(path_type=Path), default=Path("docs/steps.md"), show_default=True)
def main(
    models: tuple[str, ...], samples: int, held_out: int, seed: int, work: Path, results: Path, document: Path
) -> None:
    results.mkdir(parents=True, exist_ok=True)
    for model in models:
        checkpoint = open_checkpoint(model)
        folder = work / checkpoint.name
        seen = CalibrationSet(calibrate(checkpoint, folder / "ranges", samples=samples, seed=seed))
        other = CalibrationSet(calibrate(checkpoint, folder / "ranges-held-out", samples=held_out, seed=seed + 1))
        rows: dict[str, Json] = {}
        for bits in SETTINGS:
            for path, row in measured(checkpoint, bits, seen, other, work).items():
                rows.setdefault(path, {"layer": path, "varies": row.pop("varies")})[f"int{bits}"] = row
        asked = {"model": checkpoint.digest, "samples": samples, "held_out": held_out, "seed": seed}
        write_json(results / f"{checkpoint.name}.json", {"request": asked, "layers": list(rows.values())})
    found = {path.stem: read_json(path)["layers"] for path in sorted(results.glob("*.json"))}
    put_between(document, BEGIN, END, sections(found))


def measured(
    checkpoint: Checkpoint, bits: int, seen: CalibrationSet, other: CalibrationSet, work: Path
) -> dict[str, Json]:
    """Returns by layer how its range varies, and its output's error with one scale and with one for each step."""
    scales: dict[str, dict[str, torch.Tensor]] = {}
    for way, method in WAYS.items():
        net, plan = planned(checkpoint, bits, method, work)
        plan, states, ranges = observe(net, checkpoint.family, plan, seen)
        scales[way] = {path: states[path]["activation_scale"] for path in plan.specs if path in states}
    largest = ranges.to_json({path: [1.0] for path in states})["layers"]
    varies = {path: max(largest[path]["absmax"]) / min(largest[path]["absmax"]) for path in scales["one"]}
    wanted = [path for path, ratio in varies.items() if ratio > VARIES]
    errors = Errors(net, plan, {way: {path: found[path] for path in wanted} for way, found in scales.items()}, other)
    watch_by_step(net, checkpoint.family, wanted, other, errors.see, errors.after, "errors")
    return {path: {"varies": ratio} | (errors.row(path) if path in wanted else {}) for path, ratio in varies.items()}


def planned(checkpoint: Checkpoint, bits: int, method: str, work: Path) -> tuple[nn.Module, Plan]:
    job = compare.Job(0, 64, 1, 1, {}, work, 1)
    asked = compare.recipe_of(compare.Cell(checkpoint.name, SETTINGS[bits], "channel", method), job)
    net = checkpoint.load()
    return net, plan_layers(net, checkpoint.family, asked)


class Errors:
    """Gathers, for every layer and way, each row's relative squared error at every step."""

    def __init__(
        self, net: nn.Module, plan: Plan, scales: Mapping[str, Mapping[str, torch.Tensor]], data: CalibrationSet
    ) -> None:
        self._net, self._plan, self._scales = net, plan, scales
        rows = sum(len(next(data.read(shard, data.steps[:1]))[1]["step"]) for shard in data.shards)
        self._halves = 2 if rows == 2 * data.artifact.info["samples"] else 1  # of a call: guided, both of one noise
        self._now: dict[str, list[torch.Tensor]] = {}
        self._by_step: dict[str, list[torch.Tensor]] = {}

    def see(self, path: str, x: torch.Tensor, steps: torch.Tensor) -> None:
        layer, fmt = modules.float_layer(self._net, path), self._plan.specs[path].activation
        assert fmt is not None
        exact = layer.forward(x)  # not called: its hooks would see it again
        step = steps.repeat_interleave(len(x) // len(steps))
        for way, scales in self._scales.items():
            scale = scales[path][step].reshape(-1, *[1] * (x.ndim - 1)) if scales[path].ndim else scales[path]
            lost = (layer.forward(straight_through(x, scale, fmt)) - exact).square().flatten(1).sum(dim=1)
            error = lost / exact.square().flatten(1).sum(dim=1).clamp(min=1e-20)
            trajectories = error.reshape(self._halves, len(steps) // self._halves, -1).mean(dim=(0, 2))
            self._now.setdefault(f"{way} {path}", []).append(trajectories.double())

    def after(self, _step: int) -> None:
        for name, found in self._now.items():
            self._by_step.setdefault(name, []).append(torch.cat(found))
        self._now = {}

    def row(self, path: str) -> Json:
        found: Json = {}
        for way in self._scales:
            value, ends = bootstrap_ci95(torch.stack(self._by_step[f"{way} {path}"]).mean(dim=0))
            found[way] = {"value": value, "ci95": ends}
        return found


def sections(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Returns what stands between the document's marks."""
    return "\n".join(line for model, layers in found.items() for line in section(model, layers))


def section(model: str, layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a model's part of the document."""
    moving = sorted((row for row in layers if row["varies"] > VARIES), key=lambda row: -row["varies"])
    lines = [f"### {model}", "", f"{len(moving)} of {len(layers)} layers vary more than {VARIES:g} times.", ""]
    for bits in SETTINGS:
        found = [row[f"int{bits}"] for row in moving if f"int{bits}" in row]
        gains = [(gain(row), apart(row["one"], row["each"])) for row in found]
        better = [g for g, intervals in gains if g > 0 and intervals == "apart"]
        worse = [g for g, intervals in gains if g < 0 and intervals == "apart"]
        overlap = len(found) - len(better) - len(worse)
        lines.append(
            f"- INT{bits}: a scale for each step lowers the output's error, intervals apart, in {len(better)} of "
            f"{len(found)} of them, raises it in {len(worse)}; in {overlap} intervals overlap."
        )
    head = ["layer", "varies", *(f"INT{bits}: error, dB, one scale → each step" for bits in SETTINGS)]
    lines += ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in moving:
        cells = [f"`{row['layer']}`", f"{row['varies']:.1f}×"]
        for bits in SETTINGS:
            if f"int{bits}" not in row:  # beside 4-bit weights the timestep embedders read float inputs
                cells.append("float there")
                continue
            one, each = row[f"int{bits}"]["one"], row[f"int{bits}"]["each"]
            cells.append(f"{db(one['value']):.1f} → {db(each['value']):.1f} ({apart(one, each)})")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def gain(row: Mapping[str, Json]) -> float:
    """Returns by how many dB the error is lower with a scale for each step."""
    return db(row["one"]["value"]) - db(row["each"]["value"])


def db(error: float) -> float:
    return 10 * math.log10(max(error, 1e-20))


if __name__ == "__main__":
    main()
