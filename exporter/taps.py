"""What every layer gives along a call, in PyTorch and in an engine: where an error, a NaN or an infinity starts.

Of a layer's output a fixed share of elements is kept, so that all layers of a large model can be compared at once.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from engines.artifacts import Artifact, Json
from engines.backends import ort
from engines.schedule import with_steps
from exporter import progress
from exporter.metrics import finite, sqnr_db
from exporter.quantize import reference_feeds, reference_steps
from exporter.runners import TorchRunner
from exporter.samples import even_share

ROWS = 8  # of each reference feed
ELEMENTS = 1 << 14  # of a layer's output at one step
GROUP = 32  # outputs of an engine that are held at once
# Where an error starts: a layer this far under the floor of its own rounding, and under what fp16 sums agree to. Beyond
# a quantizer two runs differ by codes that flipped, as many more or fewer as chance has it; a fault is no matter of dB.
PAST_DB, AGREE_DB = 15.0, 60.0

Reference = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Seen:
    """What was kept of one layer's output at one step, and how many of all its values are NaN or infinite."""

    values: torch.Tensor
    not_finite: int


Outputs = dict[tuple[int, str], Seen]  # by step and layer, in the order they ran


def seen(output: torch.Tensor) -> Seen:
    flat = output.detach().flatten()
    kept = even_share(flat.numel(), ELEMENTS, torch.Generator().manual_seed(0))
    return Seen(flat[kept].clone(), int((~flat.isfinite()).sum()))


def record(runner: TorchRunner, model: nn.Module, layers: Sequence[str], reference: Reference) -> Outputs:
    """Runs a PyTorch model on the first rows of the reference feeds; returns what its layers give."""
    found: Outputs = {}
    step = 0

    def hook(path: str) -> Any:
        def see(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
            found.setdefault((step, path), seen(output))

        return see

    handles = [model.get_submodule(path).register_forward_hook(hook(path)) for path in layers]
    try:
        for step in reference_steps(reference):
            runner.run_tensors(_first_rows(reference, step))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _first_rows(reference: Reference, step: int) -> dict[str, torch.Tensor]:
    return {name: value[:ROWS] for name, value in reference_feeds(reference, step).items()}


def record_engine(engine: Artifact, layers: Iterable[str], reference: Reference) -> Outputs:
    """Runs an ONNX Runtime engine with its layers' outputs as its own; returns what they give."""
    found: Outputs = {}
    with tempfile.TemporaryDirectory() as folder:
        names = _tapped(engine.file("model.onnx"), layers, Path(folder) / "model.onnx")
        session = ort.open_session(Path(folder) / "model.onnx", engine.info["graph"])
        groups = [list(names)[i : i + GROUP] for i in range(0, len(names), GROUP)]
        for step in progress.track(steps := reference_steps(reference), len(steps), "following errors through layers"):
            feeds = {name: value.numpy() for name, value in _first_rows(reference, step).items()}
            for group in groups:
                tapped = ort.OrtRunner(session, outputs=[names[path] for path in group])
                outputs = with_steps(tapped, engine.info["graph"], engine).run(feeds)
                found |= {(step, path): seen(torch.from_numpy(outputs[names[path]])) for path in group}
    return found


def _tapped(model: Path, layers: Iterable[str], to: Path) -> dict[str, str]:
    """Writes a graph whose outputs are those of its layers; returns the values' names, by layer.

    A layer's last node gives its output: those of a convolution split at a skip are its halves' and their sum's.
    """
    graph = onnx.load(model, load_external_data=False)
    wanted = {f"{path}{mark}": path for path in layers for mark in "./"}
    last: dict[str, str] = {}
    for node in graph.graph.node:
        owner = node.name.rpartition("/")[0]
        path = wanted.get(f"{owner}/") or wanted.get(f"{owner.rpartition('.')[0]}.")
        if path is not None and node.op_type not in ("Shape", "Cast"):
            last[path] = node.output[0]
    del graph.graph.output[:]
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in last.values())
    for file in model.parent.glob(f"{model.name}.*"):  # external data
        ort.link_or_copy(file, to.parent / file.name)
    to.write_bytes(graph.SerializeToString())
    return last


def compared(runner: str, ours: Outputs, theirs: Outputs) -> list[Json]:
    """Returns, step by step and in the order they ran, each layer's SQNR of theirs against ours."""
    return [
        {
            "runner": runner,
            "layer": layer,
            "step": step,
            "sqnr_db": finite(sqnr_db(one.values, theirs[step, layer].values)),
            "not_finite": theirs[step, layer].not_finite,
        }
        for (step, layer), one in ours.items()
        if (step, layer) in theirs
    ]


def origin(rows: Sequence[Json], floors: Sequence[Json]) -> Json | None:
    """Returns the first layer, of the first step, where an error starts: with its SQNR, floor, and count of NaNs.

    `floors`: what rounding alone does to the same layers. None, if no layer is past the threshold.
    """
    floor = {(row["step"], row["layer"]): row["sqnr_db"] for row in floors}
    for row in rows:
        least = floor.get((row["step"], row["layer"]))
        if row["not_finite"] or _is_past(row["sqnr_db"], least):
            return {**row, "floor_db": least}
    return None


def _is_past(sqnr: float | None, floor: float | None) -> bool:
    """Whether an SQNR is past the threshold; None, of equal tensors, counts as infinite."""
    value, least = (math.inf if one is None else one for one in (sqnr, floor))
    return value < min(least - PAST_DB, AGREE_DB)
