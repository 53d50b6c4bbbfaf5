"""Times DilateQuant's distillation: a block's time and memory, and all steps' scales at once against one at a time.

    python tools/bench_distillation.py --out out/distillation

First blocks of DiT-B/2's size (width 768, 256 tokens, batch 32, random weights, INT4 weights and activations, a scale
for each of 4 steps): a model of one block and one of two, each trained block by block for few and for more iterations,
in a process of its own; the difference is the iterations' own time.

Then digits-dit: the scales of activations alone, from the same start, by the same optimizer. One at a time, every
step's are trained for `--each` iterations on rows of that step. In parallel all are, on rows of all steps, until the
error is no larger. The error is the mean over steps, on trajectories that neither trained on. Prints JSON; `factor` is
one time over the other.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import click
import torch
from bench_wide_dit import CONFIG, cpu
from torch import nn

from calib_data.store import CalibrationSet
from engines.artifacts import Json, read_json
from exporter import recipe, swap
from exporter.activations import observe
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.plan import plan_layers
from exporter.progress import note
from exporter.quantize import quantize
from exporter.reconstruct import OUTPUT, ModelCalls, record_targets
from exporter.samples import Samples

BATCH, RATE = 32, 1e-3
LOOK = 10  # iterations in parallel between two looks at the error


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--iterations", type=(int, int), default=(4, 24), show_default=True, help="of a block: few, and more")
@click.option("--each", default=20, show_default=True, help="iterations of every step's scales, one step at a time")
@click.option("--samples", default=256, show_default=True, help="trajectories of digits-dit")
def main(out: Path, iterations: tuple[int, int], each: int, samples: int) -> None:
    blocks = [block_row(out, count, iterations) for count in (1, 2)]
    steps = parallel(out / "steps", each, samples)
    click.echo(
        json.dumps({"cpu": cpu(), "threads": torch.get_num_threads(), "blocks": blocks, "steps": steps}, indent=1)
    )


def block_row(out: Path, blocks: int, iterations: tuple[int, int]) -> Json:
    few, more = (measured(out / f"{blocks}", blocks, count) for count in iterations)
    took = (more["seconds"] - few["seconds"]) / (iterations[1] - iterations[0])
    return {
        "blocks": blocks,
        "width": CONFIG["num_attention_heads"] * CONFIG["attention_head_dim"],  # type: ignore[operator]
        "seconds_per_1000_iterations_of_a_block": 1000 * took / blocks,
        "peak_rss_bytes": more["peak_rss_bytes"],
    }


def measured(out: Path, blocks: int, iterations: int) -> Json:
    """Quantizes in a process of its own, whose peak memory is the stage's."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=distil, args=(out, blocks, iterations, sender))
    process.start()
    sender.close()
    found: Json = receiver.recv()
    process.join()
    return found


def distil(out: Path, blocks: int, iterations: int, sender: Connection) -> None:
    model = out / "model"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(CONFIG | {"num_layers": blocks}))
    checkpoint = open_checkpoint(f"random:{model}", steps=4)
    calibration = calibrate(checkpoint, out / "calibration", samples=16)
    options = {"iterations": iterations, "batch": BATCH, "rows": 64, "joint": False, "output": False}
    source = recipe.load("dilate-w4a4").source
    *others, rule = source["rule"]
    asked = recipe.parse(f"{iterations}", {"rule": [*others, rule | {"method": {"name": "dilatequant", **options}}]})
    made = quantize(checkpoint, asked, calibration, out / f"{iterations}")
    took = read_json(made.path / "timings.json")
    if took["resumed"]:
        raise SystemExit(f"{made.path}: was stopped and gone on with, so its time is not known: remove it")
    sender.send(took)


def parallel(out: Path, each: int, samples: int) -> Json:
    """Trains all scales both ways from one start; returns errors, iterations and seconds of each."""
    checkpoint = open_checkpoint("digits-dit")
    data = CalibrationSet(calibrate(checkpoint, out / "calibration", samples=samples))
    asked, family, net = recipe.load("dilate-w4a4"), checkpoint.family, checkpoint.load()
    plan = plan_layers(net, family, asked)
    blocks = family.blocks(net)
    rows = {"all": Samples(data, samples * len(data.steps), BATCH)}
    rows |= {f"{step}": Samples(OneStep(data, step), samples, BATCH) for step in data.steps}
    for name, taken in rows.items():
        record_targets(net, family, [*blocks, OUTPUT], taken, out / name)
    calls = {name: ModelCalls(net, family, blocks, taken, out / name) for name, taken in rows.items()}
    mixed, alone = calls.pop("all"), list(calls.values())

    plan, states, _ = observe(net, family, plan, data, trajectories=asked.calibration.range_samples)
    (scope,) = swap.scopes(net, family, plan)
    learners = swap.put_learners(net, scope, plan, swap.Start({}, states))
    found = [*learners.layers.values(), *learners.points.values()]
    scope.method.phases(found, scope.options)  # after which readers of one tensor share a scale
    scales = list({id(one.log_scale): one.log_scale for one in found if one.spec.steps}.values())
    begin = [scale.detach().clone() for scale in scales]

    def error() -> float:
        return sum(one.error() for one in alone) / len(alone)

    before = error()
    note(f"error {before:.5f} at first")
    # a step's optimizer is its own: averages of gradients would go on to move the scales of those before
    seconds = sum(Trainer(scales).train(one, each) for one in alone)
    one_by_one = {"error": error(), "iterations": each * len(alone), "seconds": seconds}
    note(f"one step at a time: {one_by_one}")
    with torch.no_grad():
        for scale, value in zip(scales, begin, strict=True):
            scale.copy_(value)
    trainer, together = Trainer(scales), {"error": before, "iterations": 0, "seconds": 0.0}
    while together["error"] > one_by_one["error"] and together["iterations"] < one_by_one["iterations"]:
        together["seconds"] += trainer.train(mixed, LOOK)
        together |= {"error": error(), "iterations": together["iterations"] + LOOK}
        note(f"in parallel: {together}")
    return {
        "model": checkpoint.name,
        "batch": BATCH,
        "error_before": before,
        "one_at_a_time": one_by_one,
        "in_parallel": together,
        "reached": together["error"] <= one_by_one["error"],
        "factor": one_by_one["seconds"] / together["seconds"] if together["seconds"] else None,
    }


class OneStep(CalibrationSet):
    """The records of one sampling step."""

    def __init__(self, data: CalibrationSet, step: int) -> None:
        super().__init__(data.artifact)
        self.steps = [step]


class Trainer:
    """Trains scales by Adam at a constant rate, batch after batch."""

    def __init__(self, scales: Sequence[nn.Parameter]) -> None:
        self._optimizer = torch.optim.Adam(scales, lr=RATE, fused=True)
        self._generator = torch.Generator().manual_seed(0)

    def train(self, calls: ModelCalls, iterations: int) -> float:
        """Returns the seconds that took."""
        started = time.monotonic()
        for _ in range(iterations):
            self._optimizer.zero_grad()
            for rows in calls.batch(BATCH, self._generator):
                calls.loss(rows).backward()
            self._optimizer.step()
        return time.monotonic() - started


if __name__ == "__main__":
    main()
