"""Measures what the stages take on this machine, and prints the rates that `export-engine preflight` predicts from.

    python tools/measure_rates.py --out out/rates > exporter/rates.json

Each stage of each model runs in a process of its own, as its command does; what lies in `--out` is kept. Four models of
random weights: a tiny DiT, for what the program itself takes; a deep one, for what nodes do; a wide one, for weights;
and a U-Net, for what a call's tensors take with the kernels' own memory. None is a model that the rates are judged by
(`tools/measure_preflight.py`).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import click
from bench_dit_xl_codebooks import CONFIG
from bench_real_unets import CONFIGS

from engines.artifacts import open_artifact, read_json, write_json
from exporter.versions import versions

BACKENDS = {"ort": "fp32", "trt-rtx": "fp16"}
STEPS = 2
RECIPE = """
[calibration]
samples = 1
[[rule]]
layers = "*"
scope = "outside_blocks"
keep = "float"
[[rule]]
layers = "*"
weight = { format = "fp", exponent_bits = 4, mantissa_bits = 3 }
activation = { format = "fp", exponent_bits = 4, mantissa_bits = 3, observer = "mse" }
"""
SMALL = CONFIG | {"num_attention_heads": 2, "attention_head_dim": 32, "num_embeds_ada_norm": 10, "num_layers": 2}
HALF = {key: CONFIGS["sd15"][key][:2] for key in ("block_out_channels", "down_block_types")}
MODELS = {
    "tiny": SMALL,
    "deep": SMALL | {"num_layers": 28},
    "wide": CONFIG | {"num_layers": 8},
    "unet": CONFIGS["sd15"] | HALF | {"up_block_types": ["CrossAttnUpBlock2D"] * 2},
}


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(out: Path) -> None:
    recipe = out / "fp8-once.toml"
    out.mkdir(parents=True, exist_ok=True)
    recipe.write_text(RECIPE)
    found = {}
    for name, config in MODELS.items():
        folder = out / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        last = "calibrate" if name == "unet" else "validate" if name == "tiny" else "build"
        found[name] = measured(f"random:{folder}", str(recipe), folder / "run", steps=STEPS, last=last)
    click.echo(json.dumps(rates(found, str(recipe)), indent=1))


def measured(model: str, recipe: str, folder: Path, *, steps: int | None = None, last: str = "build") -> dict:
    """Runs the stages into `folder`, up to `last`; returns seconds and peak memory of each, and sizes written."""
    found = folder / "measured.json"
    text = Path(recipe).read_text(encoding="utf-8")
    asked = {"model": model, "recipe": text, "steps": steps, "last": last, **versions("torch", "diffusers")}
    if found.is_file() and read_json(found)["asked"] == asked:
        return read_json(found)
    if found.is_file():  # of another recipe, or another version of ours
        shutil.rmtree(folder)
    stepped = ["--steps", steps] if steps else []
    stages: dict[str, dict] = {}

    def stage(name: str, made: Path, *arguments: object) -> None:
        if not (made / "timings.json").is_file():
            run(name.split()[0], *arguments, "--out", made)
        took = read_json(made / "timings.json")
        if took["resumed"]:
            raise SystemExit(f"{made}: was stopped and gone on with, so its time is not known: remove it")
        stages[name] = {key: took[key] for key in ("seconds", "peak_rss_bytes")}

    calibration, source = folder / "calibration", folder / "quantized"
    stage("calibrate", calibration, model, "--samples", samples_of(recipe), *stepped)
    sizes = {"calibration": open_artifact(calibration, "calibration").bytes}
    if last != "calibrate":
        stage("quantize", source, model, "--recipe", recipe, "--calibration", calibration, *stepped)
        sizes["quantized"] = open_artifact(source, "quantized").info["weights"]["bytes"]
        for backend, dtype in BACKENDS.items() if last != "quantize" else ():
            graph, engine = folder / "graph" / dtype, folder / "engines" / backend
            stage(f"lower {dtype}", graph, source, "--dtype", dtype)
            stage(f"build {backend}", engine, graph, "--backend", backend, "--gpu", "sm89")
            made, built = open_artifact(graph, "graph"), open_artifact(engine, "engine")
            files = sum(made.file(name).stat().st_size for name in made.files("model.onnx"))
            sizes |= {f"graph {dtype}": made.info["weight_bytes"], f"graph {dtype} files": files}
            sizes[f"engine {backend}"] = built.info["resident_weight_bytes"]
    if last == "validate":
        run("validate", folder)
        stages["validate"] = read_json(folder / "timings.json")["stages"]["validate"]
    write_json(found, {"asked": asked, "model": model, "steps": steps, "stages": stages, "sizes": sizes})
    return read_json(found)


def samples_of(recipe: str) -> int:
    from exporter.recipe import load

    return load(recipe).calibration.samples


def run(*arguments: object) -> None:
    """Runs one command of export-engine; one that fails a check (3) has done its work."""
    command = [sys.executable, "-m", "exporter", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    code = subprocess.run(command, check=False, stdout=sys.stderr, env=environment).returncode
    if code not in (0, 3):
        raise SystemExit(f"{' '.join(command)}: exit code {code}")


@cache
def work_of(model: str, recipe: str, steps: int | None) -> object:
    """Returns what preflight says there is to do."""
    from exporter import preflight
    from exporter.checkpoint import open_checkpoint
    from exporter.recipe import load

    found = preflight.planned(open_checkpoint(model, steps=steps), load(recipe))
    return preflight.workload(found, preflight.targets(list(BACKENDS), "sm89", None))


def rates(found: dict[str, dict], recipe: str) -> dict:
    """Returns the rates; each is what one model takes beyond another, over what it has more of."""
    from exporter.estimate import IMAGES, WORD, estimates, node_count

    works = {name: work_of(one["model"], recipe, one["steps"]) for name, one in found.items()}
    nodes = {name: node_count(work) for name, work in works.items()}

    def peak(name: str, stage: str) -> int:
        return found[name]["stages"][stage]["peak_rss_bytes"]

    def more(stage: str, key: str) -> float:
        """What the deep model takes beyond the tiny one, by node."""
        both = [found[name]["stages"][stage][key] for name in ("tiny", "deep")]
        return max(0.0, (both[1] - both[0]) / (nodes["deep"] - nodes["tiny"]))

    def rest(stage: str, key: str, size: int) -> float:
        """What the wide model takes beyond the tiny one and its nodes, by byte."""
        both = [found[name]["stages"][stage][key] for name in ("tiny", "wide")]
        return max(0.0, (both[1] - both[0] - more(stage, key) * (nodes["wide"] - nodes["tiny"])) / size)

    base = {stage: peak("tiny", stage) for stage in ("calibrate", "quantize", "build ort", "build trt-rtx")}
    held = {one.stage: one.held for one in estimates(works["tiny"])}["validate"]
    base["validate"] = base["quantize"]  # the same program; the rest is what scores take of the pictures
    scored = peak("tiny", "validate") - base["validate"]
    scored -= sum(size for name, size in held.items() if name not in ("program", "pictures"))
    base["lower"] = round(peak("tiny", "lower fp32") - nodes["tiny"] * more("lower fp32", "peak_rss_bytes"))
    for name in BACKENDS:
        base[f"build {name}"] -= round(nodes["tiny"] * more(f"build {name}", "peak_rss_bytes"))
    wide, unet = works["wide"], works["unet"]
    load, call = timed(found["wide"]["model"])
    encoding = peak("wide", "quantize") - base["quantize"] - wide.float_bytes
    quantizing = found["wide"]["stages"]["quantize"]["seconds"] - load - 14 * call  # its observing and reference calls
    scratch = peak("unet", "calibrate") - base["calibrate"] - unet.float_bytes
    file = found["deep"]["sizes"]["graph fp32 files"] - found["deep"]["sizes"]["graph fp32"]
    return {
        "machine": machine(),
        "command": "python tools/measure_rates.py --out out/rates",
        "base_bytes": base,
        "scratch": round(max(1.0, scratch / unet.plain.peak_bytes), 2),
        "encode": round(max(0.0, encoding / (WORD * wide.largest)), 2),
        "whole_graphs": round(rest("lower fp32", "peak_rss_bytes", wide.graphs["fp32"]), 2),
        "pictures": round(max(0.0, scored / (WORD * IMAGES * works["tiny"].latent)), 1),
        "lower_bytes_per_node": round(more("lower fp32", "peak_rss_bytes")),
        "file_bytes_per_node": round(file / nodes["deep"], 1),
        "build": {
            name: {
                "bytes_per_node": round(more(f"build {name}", "peak_rss_bytes")),
                "bytes_per_byte": round(rest(f"build {name}", "peak_rss_bytes", wide.graphs[dtype]), 3),
                "seconds_per_node": round(more(f"build {name}", "seconds"), 6),
                "seconds_per_byte": rest(f"build {name}", "seconds", wide.graphs[dtype]),
                "maps_files": name == "ort",
            }
            for name, dtype in BACKENDS.items()
        },
        "macs_per_second": round(wide.macs / call),
        "weights_per_second": round(sum(wide.weights.values()) / max(1.0, quantizing)),
        "loaded_bytes_per_second": round(wide.float_bytes / load),
        "lower_seconds_per_node": round(more("lower fp32", "seconds"), 6),
        "start_seconds": started(),
    }


def timed(model: str) -> tuple[float, float]:
    """Returns the seconds that loading a model takes, and one call of one row, the second of two."""
    import torch

    from exporter import dry_run
    from exporter.checkpoint import open_checkpoint
    from exporter.runners import TorchRunner

    checkpoint, start = open_checkpoint(model), time.monotonic()
    runner = TorchRunner("float", checkpoint.load(), checkpoint.family)
    loaded = time.monotonic() - start
    feeds = dry_run.feeds(checkpoint.family, 1)
    runner.run_tensors(feeds)
    start = time.monotonic()
    runner.run_tensors(feeds)
    del runner
    assert torch.is_grad_enabled()
    return loaded, time.monotonic() - start


def started() -> float:
    """Returns the seconds until a stage begins."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", "import exporter.quantize"], check=True, env=os.environ)
    return round(time.monotonic() - start, 1)


def machine() -> str:
    from engines.memory import total_bytes

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} threads of {name}, {(total_bytes() or 0) / 1e9:.0f} GB"


if __name__ == "__main__":
    main()
