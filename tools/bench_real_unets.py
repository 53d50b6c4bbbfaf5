"""Calibrates, quantizes and lowers U-Nets of real size with random weights, and prints time and peak memory per stage.

    python tools/bench_real_unets.py --out out/real            Stable Diffusion 1.5 and SDXL, recipe fp8

Each stage runs in a process of its own, so that its peak resident memory is its own. One trajectory of one step, at the
model's own latent size. The configurations are the published models'.
"""

import json
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import click

from engines import artifacts
from engines.build import build
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.lower import lower
from exporter.quantize import quantize
from exporter.recipe import load

CONFIGS = {
    "sd15": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sdxl": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--model", "models", multiple=True, type=click.Choice(list(CONFIGS)), default=list(CONFIGS))
@click.option("--recipe", default="fp8", show_default=True)
@click.option("--build", "built", is_flag=True, help="also build a TensorRT-RTX engine for sm89")
def main(out: Path, models: tuple[str, ...], recipe: str, built: bool) -> None:
    stages = ("calibrate", "quantize", "lower", *(["build"] if built else []))
    results = []
    for name in models:
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
        row: dict[str, object] = {"model": name, "recipe": recipe}
        for stage in stages:
            row[stage] = measured(stage, folder, recipe)
            click.echo(f"{name} {stage}: {row[stage]}", err=True)
        row["parameters"] = artifacts.open_artifact(folder / recipe / "quantized", "quantized").info["model"][
            "parameters"
        ]
        row["graph_bytes"] = artifacts.open_artifact(folder / recipe / "graph", "graph").bytes
        results.append(row)
    click.echo(json.dumps(results, indent=1))


def measured(stage: str, folder: Path, recipe: str) -> dict[str, float]:
    """Runs one stage in a fresh process; returns its seconds and peak resident memory in GB (10⁹ bytes)."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_stage, args=(stage, folder, recipe, sender))
    process.start()
    sender.close()
    found = receiver.recv()
    process.join()
    return found


def run_stage(stage: str, folder: Path, recipe: str, sender: Connection) -> None:
    made = folder / recipe
    if stage == "calibrate":
        done = calibrate(open_checkpoint(f"random:{folder}", steps=1), folder / "calibration", samples=1)
    elif stage == "quantize":
        data = artifacts.open_artifact(folder / "calibration", "calibration")
        done = quantize(open_checkpoint(f"random:{folder}", steps=1), load(recipe), data, made / "quantized")
    elif stage == "lower":
        done = lower(artifacts.open_artifact(made / "quantized", "quantized"), made / "graph", dtype="fp16")
    else:
        done = build(artifacts.open_artifact(made / "graph", "graph"), "trt-rtx", made / "engine", gpu="sm89")
    took = artifacts.read_json(done.path / artifacts.TIMINGS)  # of when it was made, which may have been before
    if took["resumed"]:
        raise SystemExit(f"{done.path}: was stopped and gone on with, so its time is not known: remove it")
    sender.send({"seconds": round(took["seconds"], 1), "peak_rss_gb": round(took["peak_rss_bytes"] / 1e9, 2)})


if __name__ == "__main__":
    main()
