"""Where the error comes from: what each layer alone does to the denoiser's output, at every reference step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import nn

from engines.artifacts import Artifact, Json, replacing, write_json
from exporter import progress, quantized, scaling
from exporter.checkpoint import Checkpoint
from exporter.metrics import sqnr_db
from exporter.modules import put, split_inputs
from exporter.quantize import reference_feeds, reference_steps
from exporter.runners import TorchRunner, in_chunks

if TYPE_CHECKING:
    from rich.table import Table

TABLE, PICTURE = "layers.json", "layers.png"
ROWS = 8  # of each reference feed: a ranking needs fewer than a floor does
BEST_DB = 120.0  # a layer whose rounding leaves the output equal to fp32's own rounding


def damage(checkpoint: Checkpoint, source: Artifact) -> Json:
    """Quantizes one layer at a time; returns per layer the output's SQNR at every reference step, worst layer first.

    The mean is that of the noise power over steps, each relative to its own signal, in dB.
    """
    reference = {name: value[:ROWS] for name, value in load_file(source.file(quantized.REFERENCE)).items()}
    steps = reference_steps(reference)
    model = prepared(checkpoint, source)
    runner = TorchRunner("one layer quantized", model, checkpoint.family)
    stored, specs = quantized.StoredTensors(source), quantized.specs(source)
    rows: list[Json] = []
    for path, spec in progress.track(specs.items(), len(specs), "one layer at a time"):
        float_layer = model.get_submodule(path)
        put(model, path, quantized.load_layer(stored, path, spec, float_layer))
        found = [_sqnr(runner, reference, step) for step in steps]
        put(model, path, float_layer)
        rows.append({"layer": path, **spec.kinds, "mean_sqnr_db": mean_db(found), "sqnr_db": found})
    rows.sort(key=lambda row: row["mean_sqnr_db"])
    return {"steps": steps, "timesteps": [source.info["timesteps"][s] for s in steps], "layers": rows}


def prepared(checkpoint: Checkpoint, source: Artifact) -> nn.Module:
    """Returns the float model as it was when its layers were quantized: split, its channels balanced."""
    model = checkpoint.load()
    split_inputs(model, source.info["splits"])
    scaling.apply(model, checkpoint.family.folds(model), quantized.factors(source))
    return model


def _sqnr(runner: TorchRunner, reference: Mapping[str, torch.Tensor], step: int) -> float:
    output = in_chunks(runner.run_tensors, reference_feeds(reference, step), runner.family.rows(ROWS))
    return min(BEST_DB, sqnr_db(reference[f"{step}/float"], output))


def mean_db(values: Sequence[float]) -> float:
    """Returns the SQNR in dB of the mean noise power over steps, each relative to its own signal."""
    return -10 * math.log10(sum(10 ** (-value / 10) for value in values) / len(values))


def write(found: Json, folder: Path) -> None:
    """Writes layers.json, and layers.png: layers by steps as a heat map."""
    write_json(folder / TABLE, found)
    draw(found, folder / PICTURE)


def draw(found: Json, path: Path) -> None:
    """Draws layers (worst above) by steps; the darker, the lower the SQNR."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = found["layers"]
    figure = Figure(figsize=(7.5, 1.6 + 0.16 * len(rows)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow([row["sqnr_db"] for row in rows], aspect="auto", cmap="magma", interpolation="nearest")
    axis.set_yticks(range(len(rows)), [row["layer"] for row in rows], fontsize=6)
    axis.set_xticks(range(len(found["steps"])), [f"{s}" for s in found["steps"]])
    axis.set_xlabel("sampling step (0 is the noisiest)")
    axis.set_title("SQNR of the output with this layer alone quantized, dB", fontsize=9)
    figure.colorbar(image, ax=axis)
    with replacing(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary), metadata={"Software": None})


def table(found: Json, most: int = 20) -> Table:
    """Returns the worst layers as a table."""
    from rich.table import Column, Table

    steps = [f"step {step}" for step in found["steps"]]
    made = Table(Column("layer", overflow="fold"), "weight", "activation", "mean dB", *steps)
    made.title = f"SQNR of the output with one layer alone quantized: the worst {most} of {len(found['layers'])}"
    for column in made.columns[3:]:
        column.justify = "right"
    for row in found["layers"][:most]:
        values = (row["mean_sqnr_db"], *row["sqnr_db"])
        made.add_row(row["layer"], row["weight"], row["activation"] or "float", *(f"{v:.1f}" for v in values))
    return made
