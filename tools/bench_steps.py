"""Times what a scale for every step costs in ONNX Runtime, against one scale: a DiT of width 768, 256 tokens, batch 2.

    python tools/bench_steps.py --out out/steps

Random weights. INT8 (and for one row INT4) by rounding to nearest, attention's products float; and the shipped recipe
`dilate-w8a8`, untrained: products in INT8, dilation's multipliers. Prints JSON: each graph's nodes by kind, and
`ratio`, the median over that of the same with one scale, all timed in turn in one run. Exits with 3 beyond the
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
WAYS: dict[str, str] = {  # what each is held against
    "one scale": "one scale",
    "by step": "one scale",
    "by step, zero points": "one scale",
    "by step, INT4 weights": "one scale",
    "dilate-w8a8, one scale": "dilate-w8a8, one scale",
    "dilate-w8a8": "dilate-w8a8, one scale",
}
JUDGED = ("by step", "dilate-w8a8")


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
    for name in WAYS:
        folder = out / name.replace(", ", "-").replace(" ", "-")
        source = quantize(checkpoint, asked(name), calibration, folder / "quantized")
        graph = lower(source, folder / "graph", dtype="fp32")
        engine = build(graph, "ort", folder / "engine")
        found = onnx.load(graph.file("model.onnx"), load_external_data=False).graph.node
        nodes[name] = dict(Counter(node.op_type for node in found).most_common())
        targets[name] = f"engine:{engine.path}"
    rows = bench.throughput(targets, [batch], threads)
    took = {row["runner"]: row["ms_p50"] for row in rows}
    for row in rows:
        name = row["runner"]
        row["ratio"] = took[name] / took[WAYS[name]]
        row["nodes"] = sum(nodes[name].values())
        row["nodes_added"] = row["nodes"] - sum(nodes[WAYS[name]].values())
    passed = all(row["ratio"] <= MOST for row in rows if row["runner"] in JUDGED)
    found = {"cpu": cpu(), "threads": threads, "batch": batch, "rows": rows, "nodes": nodes}
    click.echo(json.dumps(found | {"at_most": MOST, "passed": passed}, indent=1))
    if not passed:
        raise SystemExit(3)


def asked(name: str) -> recipe.Recipe:
    """Returns a way's recipe."""
    if name.startswith("dilate"):
        rules = [dict(rule) for rule in recipe.load("dilate-w8a8").source["rule"]]
        rules[-1]["method"] = {"name": "dilatequant", "iterations": 0}
        if name.endswith("one scale"):
            for rule in rules:
                if "activation" in rule:
                    rule["activation"] = {key: v for key, v in rule["activation"].items() if key != "granularity"}
        return recipe.parse("bench", {"calibration": {"samples": 2}, "rule": rules})
    activation = {"format": "int", "bits": 8, "observer": "absmax"}
    activation |= {"granularity": "step"} if "by step" in name else {}
    activation |= {"zero_point": True} if "zero points" in name else {}
    weight = {"format": "int", "bits": 4 if "INT4" in name else 8}
    kept = {"layers": "*", "scope": "outside_blocks", "keep": "float"}
    rule = {"layers": "*", "weight": weight, "activation": activation}
    return recipe.parse("bench", {"calibration": {"samples": 2}, "rule": [kept, rule]})


if __name__ == "__main__":
    main()
