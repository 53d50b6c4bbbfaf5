"""Times INT8 on ONNX Runtime against PyTorch fp32 on a wide DiT: width 768, 6 layers, 256 tokens, batch 2.

    python tools/bench_wide_dit.py --out out/wide

Random weights, calibrated on 2 trajectories of 4 steps: speed does not depend on them. Prints JSON; `ratio` is
PyTorch's median over ONNX Runtime's, both timed in turn in one run with the same number of threads.
"""

import json
import os
import platform
from pathlib import Path

import click

from engines.build import build
from exporter import bench
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.lower import lower
from exporter.quantize import quantize
from exporter.recipe import load

CONFIG = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 12,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 6,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
}


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--recipe", "recipes", multiple=True, default=("int8",), show_default=True)
@click.option("--batch", default=2, show_default=True)
@click.option("--threads", type=int, default=os.cpu_count(), show_default=True)
def main(out: Path, recipes: tuple[str, ...], batch: int, threads: int) -> None:
    model = out / "model"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(CONFIG))
    checkpoint = open_checkpoint(f"random:{model}", steps=4)
    calibration = calibrate(checkpoint, out / "calibration", samples=2)
    targets = {}
    for name in recipes:
        source = quantize(checkpoint, load(name), calibration, out / name / "quantized")
        build(lower(source, out / name / "graph" / "fp32", dtype="fp32"), "ort", out / name / "engines" / "ort")
        targets |= {"float": f"float:{out / name}", f"ort {name}": f"engine:{out / name / 'engines' / 'ort'}"}
    rows = bench.throughput(targets, [batch], threads)
    base = next(row["ms_p50"] for row in rows if row["runner"] == "float")
    for row in rows:
        row["ratio"] = base / row["ms_p50"]
    click.echo(json.dumps({"cpu": cpu(), "threads": threads, "rows": rows}, indent=1))


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    text = info.read_text()
    name = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "")
    flags = [flag for flag in ("amx_int8", "avx512_vnni", "avx_vnni", "avx2") if f" {flag}" in text]
    return f"{name} ({', '.join(flags)})"


if __name__ == "__main__":
    main()
