"""`run`: all stages in turn; one that is up to date is skipped, so the same command resumes after a kill."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from engines import artifacts, backends
from engines.artifacts import Artifact, Json, digest_file
from engines.build import build
from engines.errors import UserError
from engines.loading import elsewhere
from engines.memory import peak_rss_bytes
from engines.options import Options
from exporter import bench, damage, devices, html_report, progress, quantized
from exporter.calibrate import calibrate, request_for
from exporter.checkpoint import Checkpoint
from exporter.images import IMAGES, SHOWN
from exporter.layers import compare_layers
from exporter.lower import lower
from exporter.plan import plan_layers
from exporter.quantize import quantize
from exporter.recipe import Recipe
from exporter.run_folder import REPORT, Run, locked, remove_stale
from exporter.support import refuse, targets_of
from exporter.validate import validate
from exporter.versions import versions

PICTURE = "samples.png"


def run(
    checkpoint: Checkpoint,
    recipe: Recipe,
    out: Path,
    *,
    backend_names: Sequence[str],
    gpu: str | None = None,
    dtype: str | None = None,
    options: Options | None = None,
    seed: int = 0,
    prompts: Sequence[str] | None = None,
    calibration: Path | None = None,
    images: int | None = None,
    device: torch.device = devices.CPU,
) -> Json:
    """Calibrates, quantizes, lowers, builds and validates into `out`; returns the report.

    `prompts` are the user's own for calibration; `calibration` is a set to use again, as another recipe's run left it.
    `images` are drawn and scored (default: IMAGES). PyTorch samples and trains on `device`.
    """
    targets = targets_of(backend_names, gpu, dtype, options or Options())
    model = checkpoint.skeleton()
    refuse(checkpoint, recipe, model, plan_layers(model, checkpoint.family, recipe), targets)
    with locked(out):
        data = _calibration(checkpoint, recipe, out, calibration, seed=seed, prompts=prompts, device=device)
        source = _stage("quantize", quantize, checkpoint, recipe, data, out / "quantized", device=device)
        graphs = {
            d: _stage(f"lower {d}", lower, source, out / "graph" / d, dtype=d)
            for d in dict.fromkeys(target.dtype for target in targets)
        }
        for t in targets:
            if note := backends.load(t.backend).note(graphs[t.dtype].info, t.options):
                progress.note(f"note: {note}")
        engines = {
            t.backend: _stage(
                f"build {t.backend}" + (f" for {t.gpu}" if t.gpu else ""), build, graphs[t.dtype], t.backend,
                out / "engines" / t.backend, gpu=t.gpu, options=t.options,
            )
            for t in targets
        }  # fmt: skip
        remove_stale(out, source)
        return report(checkpoint, Run(source, graphs, engines), out, seed=seed, images=images, device=device)


def _calibration(
    checkpoint: Checkpoint,
    recipe: Recipe,
    out: Path,
    given: Path | None,
    *,
    seed: int,
    prompts: Sequence[str] | None,
    device: torch.device,
) -> Artifact:
    wanted: dict[str, Any] = {
        "samples": recipe.calibration.samples,
        "seed": seed,
        "record_steps": recipe.calibration.record_steps,
        "prompts": prompts,
    }
    if given is None:
        return _stage("calibrate", calibrate, checkpoint, out / "calibration", device=device, **wanted)
    request = request_for(checkpoint, **wanted)
    theirs = artifacts.open_artifact(given, "calibration").manifest
    found = artifacts.current(given, request)
    if found is None:
        ours = request.to_json()
        other = [
            f"{key} {theirs['settings'].get(key)} against {value}"
            for key, value in ours["settings"].items()
            if theirs["settings"].get(key) != value
        ]
        other += ["another model, or another sampler"] * (theirs["made_from"] != ours["made_from"])
        other += ["other versions of the program or of libraries"] * (theirs["versions"] != ours["versions"])
        raise UserError(
            f"{given}: is not what recipe {recipe.name!r} asks for: {'; '.join(other)}",
            fix="leave out --calibration, and a set is recorded",
        )
    progress.note(f"calibrate: {given} is used again")
    return found


def _stage(title: str, stage: Callable[..., Artifact], *args: Any, **kwargs: Any) -> Artifact:
    started = time.time()
    made = stage(*args, **kwargs)
    devices.release()
    fresh = (made.path / artifacts.TIMINGS).stat().st_mtime >= started
    progress.note(f"{title}: " + (f"{time.time() - started:.1f} s" if fresh else "unchanged, kept"))
    return made


def report(
    checkpoint: Checkpoint,
    run: Run,
    out: Path,
    *,
    seed: int,
    images: int | None = None,
    device: torch.device = devices.CPU,
) -> Json:
    """Validates and writes report.json, timings.json and the samples, unless they are there for the same inputs.

    report.html, which shows the runs beside it too, is written in any case.
    """
    made_from = run.judged
    settings = {"seed": seed, "images": images or IMAGES, **versions("torch", "diffusers")}
    if (kept := _kept(out, made_from, settings, run)) is not None:
        progress.note("validate: unchanged, kept")
        html_report.write(out)  # runs beside it may have come, or it is of an earlier version
        return kept
    _note_replaced(out, images or IMAGES)
    started = time.monotonic()
    with devices.memory():
        content = validate(checkpoint, run, out, seed=seed, count=images, device=device)
    devices.release()
    content |= {"made_from": made_from, "settings": settings, "samples": digest_file(out / PICTURE)}
    content["shown"] = digest_file(out / SHOWN)
    content["throughput"] = bench.throughput(bench.targets_of(out))
    progress.note(f"validate: {time.monotonic() - started:.1f} s")
    artifacts.write_json(out / REPORT, content)
    artifacts.write_json(out / artifacts.TIMINGS, _timings(run, content, time.monotonic() - started, device))
    html_report.write(out)
    return content


def layers(checkpoint: Checkpoint, run: Run, out: Path) -> Json:
    """Ranks layers by the damage each does alone, and compares each in every graph with PyTorch; writes both."""
    if not quantized.specs(run.quantized):
        raise UserError(f"{out}: its recipe quantizes no layer", fix="rank the layers of a run whose recipe does")
    found = damage.damage(checkpoint, run.quantized) | {
        "graphs": compare_layers(run),
        "quantized": run.quantized.digest,
    }
    damage.write(found, out)
    if (out / REPORT).is_file():
        html_report.write(out)  # which shows the ranking
    return found


def _note_replaced(out: Path, images: int) -> None:
    """Says that a report of another number of images goes."""
    settings = _read_report(out).get("settings") if (out / REPORT).is_file() else None
    before = settings.get("images", images) if isinstance(settings, dict) else images
    if before != images:
        progress.note(f"note: {out / REPORT}, of {before} images, is replaced by one of {images}")


def _kept(out: Path, made_from: Mapping[str, str], settings: Json, run: Run) -> Json | None:
    """Returns the report that is there, if it is of the same inputs, and of all engines that can run here."""
    if not all((out / name).is_file() for name in (REPORT, PICTURE, SHOWN)):
        return None
    found = _read_report(out)
    same = found.get("made_from") == made_from and found.get("settings") == settings
    pictures = found.get("samples") == digest_file(out / PICTURE) and found.get("shown") == digest_file(out / SHOWN)
    ran = {row["backend"] for row in found.get("engines", []) if row.get("ran")}
    able = {name for name, engine in run.engines.items() if elsewhere(engine) is None}
    return found if same and pictures and able <= ran else None


def _read_report(out: Path) -> Json:
    return artifacts.read_json(out / REPORT, fix="remove it, and give the same command again")


def _timings(run: Run, content: Json, validate_seconds: float, device: torch.device) -> Json:
    made = {"quantized": run.quantized}
    made |= {f"graph {name}": graph for name, graph in run.graphs.items()}
    made |= {f"engine {name}": engine for name, engine in run.engines.items()}
    stages = {name: artifacts.read_json(artifact.path / artifacts.TIMINGS) for name, artifact in made.items()}
    peak = peak_rss_bytes()  # of all stages run by this process
    validated = {"seconds": validate_seconds, "peak_rss_bytes": peak, "device": devices.name(device)}
    return {"stages": {**stages, "validate": validated}, "throughput": content["throughput"]}
