"""Adds NVIDIA ModelOpt's presets to the table of `compare_methods`: same models, calibration data, captions and noise.

    python3 -m venv out/peer
    out/peer/bin/python -m pip install --constraint constraints.txt --requirement tools/peers/requirements.txt .
    PYTHONPATH=tools out/peer/bin/python tools/peers/modelopt_cells.py digits-dit shapes-unet

Layers that our recipes keep in float are kept in float here too; for the rest the presets are as they ship. The PyTorch
model with simulated quantization is judged: ModelOpt's exporter plays no part.
"""

from __future__ import annotations

import copy
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import compare_methods as compare
import torch
from torch import nn

from calib_data.store import CalibrationSet
from engines.artifacts import Json, read_json
from engines.memory import peak_rss_bytes
from exporter import recipe
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.plan import plan_layers
from exporter.runners import TorchRunner
from exporter.watch import ROWS

PRESETS = {
    "FP8": "FP8_DEFAULT_CFG",
    "INT8": "INT8_DEFAULT_CFG",
    "INT8 SmoothQuant": "INT8_SMOOTHQUANT_CFG",
    "INT4 blocks": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "INT4 AWQ": "INT4_AWQ_CFG",
}


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--images", type=click.IntRange(min=16), help="per cell [default: as compare_methods]")
@click.option("--samples", default=64, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("out/compare"), show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=Path("docs/methods"), show_default=True)
def main(models: tuple[str, ...], images: int | None, samples: int, seed: int, work: Path, results: Path) -> None:
    todo: list[tuple[Path, Any, tuple[Any, ...]]] = []
    for model in models:
        counts = (images, images) if images else compare.IMAGES.get(model, compare.OTHERS)
        job = compare.Job(seed, samples, *counts, {}, work, 1)
        checkpoint = open_checkpoint(model)
        compare.references(checkpoint, job, job.images)
        for name in PRESETS:
            path = results / model / f"modelopt.{name.lower().replace(' ', '-')}.json"
            if not path.exists() or read_json(path)["request"] != request_of(checkpoint, name, job):
                todo.append((path, cell, (model, name, job)))
    compare.run(todo, 1)


def request_of(checkpoint: Checkpoint, name: str, job: compare.Job) -> Json:
    return compare.shared_request(checkpoint, job) | {"preset": PRESETS[name], "modelopt": version("nvidia-modelopt")}


def cell(model_name: str, name: str, job: compare.Job) -> Json:
    """Quantizes with a preset, draws and judges."""
    import modelopt.torch.quantization as mtq

    torch.set_num_threads(job.threads)
    checkpoint = open_checkpoint(model_name)
    floats = compare.references(checkpoint, job, job.images)
    data = CalibrationSet(compare.calibration_of(checkpoint, job))
    family = checkpoint.family
    model = checkpoint.load()
    kept = [path for path, rule in plan_layers(model, family, recipe.load("fp8")).rules.items() if rule.weight is None]
    model = checkpoint.load()  # the plan split the skips
    config = copy.deepcopy(getattr(mtq, PRESETS[name]))
    config["quant_cfg"] += [{"quantizer_name": f"{path}.*", "enable": False} for path in kept]

    def forward_all(net: nn.Module) -> None:
        runner = TorchRunner("calibration", net, family)
        for shard in data.shards:
            for feeds in data.batches(shards=[shard], rows=family.rows(ROWS)):
                runner.run_tensors(feeds)

    started = time.monotonic()
    with torch.no_grad():
        model = mtq.quantize(model, config, forward_all)
    minutes, peak = (time.monotonic() - started) / 60, peak_rss_bytes()
    started = time.monotonic()
    conditions, indices = compare.conditions_of(checkpoint, job, job.images)
    images = compare.draw(TorchRunner("modelopt", model, family), checkpoint, conditions, indices, job.seed)
    return {
        "request": request_of(checkpoint, name, job),
        "cell": {"model": checkpoint.name, "setting": f"ModelOpt {name}", "granularity": "preset", "method": "peer"},
        "bits_per_weight": bits_per_weight(model),
        "layers": len(_quantizers(model)),
        **compare.judge(checkpoint, images, floats),
        "minutes": minutes,
        "judge_minutes": (time.monotonic() - started) / 60,
        "peak_rss_bytes": peak,
    }


def _quantizers(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Returns the layers whose weights are quantized, each with its weight's quantizer."""
    found = ((module, getattr(module, "weight_quantizer", None)) for module in model.modules())
    return [(module, one) for module, one in found if one is not None and one.is_enabled]


def bits_per_weight(model: nn.Module) -> float:
    """Counts codes, and a 16-bit scale for each of a quantizer's ranges, over the layers that are quantized."""
    bits = weights = 0
    for module, quantizer in _quantizers(model):
        width = quantizer.num_bits if isinstance(quantizer.num_bits, int) else 1 + sum(quantizer.num_bits)
        bits += module.weight.numel() * width + 16 * quantizer.amax.numel()
        weights += module.weight.numel()
    return bits / weights


if __name__ == "__main__":
    main()
