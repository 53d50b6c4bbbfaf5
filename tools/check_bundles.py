"""Bundles shipped recipes and draws the same samples from the same noise: Python without torch, C++, and diffusers.

    python tools/check_bundles.py digits-dit --cpp build/cpp/examples/export-engine-run --out out/bundles

Methods that train take one iteration, on few trajectories: what is compared are runtimes, not what was learned. Every
row is a bundle: its recorded calls, the least PSNR between any two runtimes and against what was recorded, the limit
(60 dB, or 3 dB under the lowest floor where that is lower), and how many of 200 flipped bytes were refused. Where a
bundle carries a whole pipeline, Python without torch draws pictures from captions and C++ from token ids; they are held
against each other and the recorded ones. Exit code 3 where one falls short.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from audit_recipes import SAMPLES, untrained
from numpy.typing import NDArray
from safetensors.numpy import load_file

import engines
from engines import golden
from engines.artifacts import Json, write_json
from engines.build import build
from engines.bundle import open_bundle
from engines.errors import UserError
from engines.zipped import pack
from exporter import recipe, run
from exporter.bundle import PICTURES, bundle
from exporter.calibrate import calibrate
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.conditions import Conditions, validation_entries
from exporter.images import SEED_OFFSET
from exporter.lower import lower
from exporter.progress import note, stdout
from exporter.quantize import quantize
from exporter.run_folder import Run
from exporter.sampling import scheduler_for

IMAGES = 16  # of a report, which a bundle wants: what they score is not looked at
PICTURE_PEAK = 2.0  # pictures lie in [−1, 1]
FLIPS = 200
BLOCKED = ("torch", "diffusers", "transformers", "exporter", "onnx", "polygraphy")
WITHOUT_TORCH = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None  # an import of it fails
from safetensors.numpy import save_file
import engines
from engines import golden
engine = engines.load({bundle!r})
given = golden.read(engine.bundle, "picture/")
halves = [{{n.removeprefix(p): v for n, v in given.items() if n.startswith(p)}} for p in ("wanted/", "unwanted/")]
drawn = {{"latent": engine.sample(given["noise"], halves[0], halves[1] or None)}}
if engine.bundle.info["pipeline"]:
    drawn["picture"] = engines.load_pipeline({bundle!r}).draw({captions!r}, noise=given["noise"])
save_file(drawn, {out!r})
"""


Drawn = dict[str, NDArray[np.float32]]  # latents, and where there is a whole pipeline pictures


def bundled(model: str, name: str, out: Path) -> tuple[Path, list[str]]:
    """Returns a recipe's bundle, made by methods that hardly trained, and what its recorded pictures show."""
    checkpoint = open_checkpoint(model)
    folder = out / Path(model).name / name
    calibration = calibrate(checkpoint, folder.parent / "calibration", samples=SAMPLES)
    source = quantize(checkpoint, untrained(name), calibration, folder / "run/quantized")
    graph = lower(source, folder / "run/graph/fp32", dtype="fp32")
    made = Run(source, {"fp32": graph}, {"ort": build(graph, "ort", folder / "run/engines/ort")})
    run.report(checkpoint, made, folder / "run", seed=0, images=IMAGES)
    path = bundle(folder / "run", folder / "bundle", failed=True).path
    asked = Conditions(checkpoint, validation_entries(checkpoint, source.info["entries"]))
    return path, asked.asked([SEED_OFFSET + i for i in range(PICTURES)])


def python(path: Path, captions: list[str], out: Path) -> Drawn:
    names = {"blocked": BLOCKED, "bundle": str(path), "captions": captions, "out": str(out / "python.safetensors")}
    script = WITHOUT_TORCH.format(**names)
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(engines.__file__).parent.parent)
    return load_file(out / "python.safetensors")


def cpp(program: Path, path: Path, whole: bool, out: Path) -> Drawn:
    asked = ["--sample", "--draw"] if whole else ["--sample"]
    subprocess.run([program, path, *asked, "--out", out / "cpp.safetensors"], check=True, stdout=subprocess.DEVNULL)
    found = load_file(out / "cpp.safetensors")
    return {n.removeprefix("picture/"): value for n, value in found.items() if n.startswith("picture/")}


def diffusers(path: Path, checkpoint: Checkpoint) -> NDArray[np.float32]:
    """Draws as a diffusers pipeline does: its scheduler, the drop-in in the denoiser's place, torch tensors."""
    from engines.diffusers import denoiser

    drop_in, scheduler = denoiser(path), scheduler_for(checkpoint)
    given = {n: torch.from_numpy(value) for n, value in golden.read(open_bundle(path), "picture/").items()}
    halves = [_half(given, "wanted/"), _half(given, "unwanted/")]
    rows = {n: torch.cat([value, halves[1][n]]) if halves[1] else value for n, value in halves[0].items()}
    latent = given["noise"] * scheduler.init_noise_sigma
    guidance = float(checkpoint.sampler["guidance_scale"])
    for timestep in scheduler.timesteps:
        doubled = torch.cat([latent, latent]) if halves[1] else latent
        output = drop_in(scheduler.scale_model_input(doubled, timestep), timestep=timestep, **rows).sample
        prediction = checkpoint.family.prediction(output)
        if halves[1]:
            wanted, unwanted = prediction.chunk(2)
            prediction = unwanted + guidance * (wanted - unwanted)
        latent = scheduler.step(prediction, timestep, latent).prev_sample
    return latent.numpy()


def _half(given: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}


def psnr_db(one: NDArray[Any], other: NDArray[Any], peak: float) -> float:
    """Returns the PSNR of two samples: −∞ where one has NaN or infinite values, or another shape."""
    if one.shape != other.shape or not (np.isfinite(one).all() and np.isfinite(other).all()):
        return -np.inf
    error = float(np.square(one.astype(np.float64) - other).mean())
    return float(10 * np.log10(peak**2 / error)) if error else np.inf


def least_db(drawn: list[NDArray[Any]], peak: float) -> float:
    """Returns the least PSNR of any two: infinite where all are equal, or none is there."""
    return min((psnr_db(one, other, peak) for one, other in combinations(drawn, 2)), default=np.inf)


def refused(path: Path, seed: int) -> int:
    """Returns how many of FLIPS copies with one flipped byte, in any file or in the zip, are refused."""
    generator, found = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as place:
        copy, packed = Path(place) / "copy", Path(place) / "copy.zip"
        shutil.copytree(path, copy)
        pack(copy, packed)
        files = [file for file in sorted(copy.rglob("*")) if file.is_file()] + [packed]
        for number in range(FLIPS):
            file = files[number % len(files)]
            content = bytearray(file.read_bytes())
            position, flip = generator.randrange(len(content)), 1 << generator.randrange(8)
            content[position] ^= flip
            file.write_bytes(content)
            try:
                open_bundle(packed if file == packed else copy)
            except UserError:
                found += 1
            content[position] ^= flip
            file.write_bytes(content)
    return found


def checked(model: str, name: str, program: Path | None, out: Path) -> Json:
    path, captions = bundled(model, name, out)
    opened = open_bundle(path)
    recorded, picture = golden.read(opened, "picture/"), opened.info["golden"]["picture"]
    drawn = {"python": python(path, captions, path.parent)}
    drawn["diffusers"] = {"latent": diffusers(path, open_checkpoint(model))}
    if program is not None:
        drawn["cpp"] = cpp(program, path, opened.info["pipeline"] is not None, path.parent)
    drawn["recorded"] = {kind: recorded[kind] for kind in drawn["python"]}
    least = {
        "latent": least_db([one["latent"] for one in drawn.values()], picture["peak"]),
        "picture": least_db([one["picture"] for one in drawn.values() if "picture" in one], PICTURE_PEAK),
    }
    limit = picture["limits_db"]["fp32"]
    rows = golden.rows(engines.load(path), opened)
    return {
        "model": Path(model).name, "recipe": name, "runtimes": sorted({*drawn} - {"recorded"}),
        "bytes": opened.artifact.bytes,
        "golden_passed": sum(row["passed"] for row in rows), "golden_rows": len(rows),
        "whole_pipeline": opened.info["pipeline"] is not None,
        **{f"least_{kind}_db": told(value) for kind, value in least.items()},
        "limit_db": limit, "refused": refused(path, seed=0), "flips": FLIPS,
        "passed": min(least.values()) >= limit and all(row["passed"] for row in rows),
    }  # fmt: skip


def told(db: float) -> float | str:
    """JSON has no infinity: samples are equal, or cannot be compared."""
    return db if np.isfinite(db) else "equal" if db > 0 else "not finite"


def table(found: list[Json]) -> Any:
    from rich.table import Table

    made = Table(title="the same noise, in every runtime")
    least = ("least PSNR of samples", "of whole pipelines' pictures")
    for column in ("model", "recipe", "runtimes", "recorded calls", *least, "limit", "flips refused"):
        made.add_column(column)
    for one in found:
        made.add_row(
            one["model"], one["recipe"], ", ".join(one["runtimes"]), f"{one['golden_passed']} of {one['golden_rows']}",
            spelled(one["least_latent_db"]), spelled(one["least_picture_db"]) if one["whole_pipeline"] else "",
            spelled(one["limit_db"]), f"{one['refused']} of {one['flips']}",
        )  # fmt: skip
    return made


def spelled(db: float | str) -> str:
    return db if isinstance(db, str) else f"{db:.1f} dB"


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--recipes", default=",".join(recipe.names()), show_default=True)
@click.option(
    "--cpp", "program", type=click.Path(path_type=Path, exists=True), help="export-engine-run, as CMake built it."
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/bundles"), show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(models: tuple[str, ...], recipes: str, program: Path | None, out: Path, as_json: bool) -> None:
    """Draws everywhere, prints a table; exits with 3 where a runtime draws something else, or damage goes unseen."""
    found = []
    for model in models:
        for name in recipes.split(","):
            found.append(checked(model, name, program, out))
            write_json(out / found[-1]["model"] / f"{name}.json", found[-1])
            note(f"{model} {name}: {spelled(found[-1]['least_latent_db'])}, {found[-1]['refused']} of {FLIPS} refused")
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        stdout().print(table(found))
    if not all(one["passed"] and one["refused"] == one["flips"] for one in found):
        sys.exit(3)


if __name__ == "__main__":
    main()
