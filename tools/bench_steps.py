"""Times what a scale for every step costs in ONNX Runtime, against one scale: a DiT of width 768, 256 tokens, batch 2.

    python tools/bench_steps.py --out out/steps

Random weights, INT8 (and for one row INT4) by rounding to nearest, attention's products float. Prints JSON: each
graph's nodes by kind, and `ratio`, the median over that of one scale, timed in turn in one run. Exits with 3 beyond the
project's bar.
"""

import json
import os
from collections import Counter
from pathlib import Path

import click
import onnx
from bench_wide_dit import CONFIG, cpu

from engines.build import build
from exporter import bench, recipe
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.lower import lower
from exporter.quantize import quantize

MOST = 1.08  # the project's bar, of a symmetric scale for every step
WAYS: dict[str, tuple[int, dict]] = {  # bits of weights, and what activations have
    "one scale": (8, {}),
    "by step": (8, {"granularity": "step"}),
    "by step, zero points": (8, {"granularity": "step", "zero_point": True}),
    "by step, INT4 weights": (4, {"granularity": "step"}),
}


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--batch", default=2, show_default=True)
@click.option("--threads", type=int, default=os.cpu_count(), show_default=True)
def main(out: Path, batch: int, threads: int) -> None:
    model = out / "model"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(CONFIG))
    checkpoint = open_checkpoint(f"random:{model}", steps=4)
    calibration = calibrate(checkpoint, out / "calibration", samples=2)
    targets, nodes = {}, {}
    for name, way in WAYS.items():
        folder = out / name.replace(", ", "-").replace(" ", "-")
        source = quantize(checkpoint, asked(*way), calibration, folder / "quantized")
        graph = lower(source, folder / "graph", dtype="fp32")
        engine = build(graph, "ort", folder / "engine")
        found = onnx.load(graph.file("model.onnx"), load_external_data=False).graph.node
        nodes[name] = dict(Counter(node.op_type for node in found).most_common())
        targets[name] = f"engine:{engine.path}"
    rows = bench.throughput(targets, [batch], threads)
    base = next(row["ms_p50"] for row in rows if row["runner"] == "one scale")
    for row in rows:
        row["ratio"] = row["ms_p50"] / base
        row["nodes"] = sum(nodes[row["runner"]].values())
    passed = all(row["ratio"] <= MOST for row in rows if row["runner"] == "by step")
    found = {"cpu": cpu(), "threads": threads, "batch": batch, "rows": rows, "nodes": nodes}
    click.echo(json.dumps(found | {"at_most": MOST, "passed": passed}, indent=1))
    if not passed:
        raise SystemExit(3)


def asked(bits: int, extra: dict) -> recipe.Recipe:
    """Returns weights of so many bits beside INT8, rounded to nearest in the blocks, activations as `extra` says."""
    activation = {"format": "int", "bits": 8, "observer": "absmax", **extra}
    rule = {"layers": "*", "weight": {"format": "int", "bits": bits}, "activation": activation}
    kept = {"layers": "*", "scope": "outside_blocks", "keep": "float"}
    return recipe.parse("bench", {"calibration": {"samples": 2}, "rule": [kept, rule]})


if __name__ == "__main__":
    main()
