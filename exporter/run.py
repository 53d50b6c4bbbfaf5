"""`run`: all stages in turn; one that is up to date is skipped, so the same command resumes after a kill."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines import artifacts, backends
from engines.artifacts import Artifact, Json, digest_file
from engines.build import build
from engines.errors import UserError
from exporter import bench, damage, progress, quantized
from exporter.calibrate import calibrate, request_for
from exporter.checkpoint import Checkpoint
from exporter.layers import compare_layers
from exporter.lower import DTYPES, check_deployable, lower
from exporter.plan import layer_specs
from exporter.quantize import quantize
from exporter.recipe import Recipe
from exporter.validate import Run, validate
from exporter.versions import versions

REPORT, PICTURE = "report.json", "samples.png"


@dataclass(frozen=True)
class Target:
    """One engine to build."""

    backend: str
    gpu: str | None
    dtype: str
    decode: str | None


def run(
    checkpoint: Checkpoint,
    recipe: Recipe,
    out: Path,
    *,
    backend_names: Sequence[str],
    gpu: str | None = None,
    dtype: str | None = None,
    decode: str | None = None,
    seed: int = 0,
    prompts: Sequence[str] | None = None,
    calibration: Path | None = None,
) -> Json:
    """Calibrates, quantizes, lowers, builds and validates into `out`; returns the report.

    `prompts` are the user's own for calibration; `calibration` is a set to use again, as another recipe's run left it.
    """
    targets = [_target(name, gpu, dtype, decode) for name in dict.fromkeys(backend_names)]
    preflight(checkpoint, recipe, targets)
    with locked(out):
        data = _calibration(checkpoint, recipe, out, calibration, seed=seed, prompts=prompts)
        source = _stage("quantize", quantize, checkpoint, recipe, data, out / "quantized")
        graphs = {
            d: _stage(f"lower {d}", lower, source, out / "graph" / d, dtype=d)
            for d in dict.fromkeys(target.dtype for target in targets)
        }
        for t in targets:
            if note := backends.load(t.backend).note(graphs[t.dtype].info, t.decode):
                progress.note(f"note: {note}")
        engines = {
            t.backend: _stage(
                f"build {t.backend}" + (f" for {t.gpu}" if t.gpu else ""), build, graphs[t.dtype], t.backend,
                out / "engines" / t.backend, gpu=t.gpu, decode=t.decode,
            )
            for t in targets
        }  # fmt: skip
        _remove_stale(out, source)
        return report(checkpoint, Run(source, graphs, engines), out, seed=seed)


def _remove_stale(out: Path, source: Artifact) -> None:
    """Removes graphs and engines that an earlier run left here and that are not of this run's quantized model."""
    for artifact in _stale(out, source):
        progress.note(f"{artifact.path.relative_to(out)}: of an earlier run with another recipe or model, removed")
        shutil.rmtree(artifact.path)


def _stale(out: Path, source: Artifact) -> list[Artifact]:
    graphs, engines = _graphs(out).values(), _engines(out).values()
    old = [graph for graph in graphs if graph.manifest["made_from"]["quantized"] != source.digest]
    fresh = {graph.digest for graph in graphs} - {graph.digest for graph in old}
    return [*old, *(engine for engine in engines if engine.manifest["made_from"]["graph"] not in fresh)]


def _graphs(out: Path) -> dict[str, Artifact]:
    return {d: artifacts.open_artifact(out / "graph" / d, "graph") for d in DTYPES if (out / "graph" / d).is_dir()}


def _engines(out: Path) -> dict[str, Artifact]:
    folders = sorted((out / "engines").glob("*")) if (out / "engines").is_dir() else []
    return {f.name: artifacts.open_artifact(f, "engine") for f in folders if f.name in backends.names()}


def _calibration(
    checkpoint: Checkpoint,
    recipe: Recipe,
    out: Path,
    given: Path | None,
    *,
    seed: int,
    prompts: Sequence[str] | None,
) -> Artifact:
    wanted: dict[str, Any] = {
        "samples": recipe.calibration.samples,
        "seed": seed,
        "record_steps": recipe.calibration.record_steps,
        "prompts": prompts,
    }
    if given is None:
        return _stage("calibrate", calibrate, checkpoint, out / "calibration", **wanted)
    artifacts.open_artifact(given, "calibration")
    found = artifacts.current(given, request_for(checkpoint, **wanted))
    if found is None:
        raise UserError(
            f"{given}: was recorded for another model, other captions, or another number of samples or steps than "
            f"recipe {recipe.name!r} asks for",
            fix="leave out --calibration, and a set is recorded",
        )
    progress.note(f"calibrate: {given} is used again")
    return found


def _target(name: str, gpu: str | None, dtype: str | None, decode: str | None) -> Target:
    module = backends.load(name)
    resolved = module.resolve_gpu(gpu)
    if gpu is not None and resolved is None:
        progress.note(f"note: --gpu {gpu} says nothing to {name}, which runs wherever it is opened")
    if decode is not None and not module.DECODES:
        progress.note(f"note: --decode {decode} says nothing to {name}, which decodes codebooks its own way")
        decode = None
    return Target(name, resolved, dtype or module.DTYPE, backends.resolve_decode(name, decode))


def preflight(checkpoint: Checkpoint, recipe: Recipe, targets: Sequence[Target]) -> None:
    """Refuses now what a later stage would refuse after minutes or hours."""
    specs = layer_specs(checkpoint, recipe)
    check_deployable({path: spec.to_json() for path, spec in specs.items()}, f"recipe {recipe.name!r}")
    kinds = {path: spec.engine_types for path, spec in specs.items()}
    for target in targets:
        backends.load(target.backend).check(kinds, target.gpu)


def _stage(title: str, stage: Callable[..., Artifact], *args: Any, **kwargs: Any) -> Artifact:
    started = time.time()
    made = stage(*args, **kwargs)
    fresh = (made.path / artifacts.TIMINGS).stat().st_mtime >= started
    progress.note(f"{title}: " + (f"{time.time() - started:.1f} s" if fresh else "unchanged, kept"))
    return made


def report(checkpoint: Checkpoint, run: Run, out: Path, *, seed: int) -> Json:
    """Validates and writes report.json, timings.json and samples.png, unless they are there for the same inputs."""
    made_from = {"quantized": run.quantized.digest} | {
        f"engine {name}": engine.digest for name, engine in sorted(run.engines.items())
    }
    settings = {"seed": seed, **versions("torch", "diffusers")}
    if (kept := _kept(out, made_from, settings)) is not None:
        progress.note("validate: unchanged, kept")
        return kept
    started = time.monotonic()
    content = validate(checkpoint, run, out, seed=seed)
    content |= {"made_from": made_from, "settings": settings, "samples": digest_file(out / PICTURE)}
    content["throughput"] = bench.throughput(bench.targets_of(out))
    progress.note(f"validate: {time.monotonic() - started:.1f} s")
    artifacts.write_json(out / REPORT, content)
    artifacts.write_json(out / artifacts.TIMINGS, _timings(run, content, time.monotonic() - started))
    return content


def layers(checkpoint: Checkpoint, run: Run, out: Path) -> Json:
    """Ranks layers by the damage each does alone, and compares each in every graph with PyTorch; writes both."""
    found = damage.damage(checkpoint, run.quantized) | {"graphs": compare_layers(run)}
    damage.write(found, out)
    return found


def _kept(out: Path, made_from: Mapping[str, str], settings: Json) -> Json | None:
    if not (out / REPORT).is_file() or not (out / PICTURE).is_file():
        return None
    found = artifacts.read_json(out / REPORT)
    same = found.get("made_from") == made_from and found.get("settings") == settings
    return found if same and found.get("samples") == digest_file(out / PICTURE) else None


def _timings(run: Run, content: Json, validate_seconds: float) -> Json:
    made = {"quantized": run.quantized}
    made |= {f"graph {name}": graph for name, graph in run.graphs.items()}
    made |= {f"engine {name}": engine for name, engine in run.engines.items()}
    stages = {name: artifacts.read_json(artifact.path / artifacts.TIMINGS) for name, artifact in made.items()}
    return {"stages": {**stages, "validate": {"seconds": validate_seconds}}, "throughput": content["throughput"]}


def open_run(out: Path) -> tuple[Checkpoint, Run]:
    """Opens what `run` left in a folder."""
    if not (out / "quantized").is_dir():
        raise UserError(f"{out}: holds no run (no quantized/)", fix="give the --out of an export-engine run")
    source = artifacts.open_artifact(out / "quantized", "quantized")
    if stale := _stale(out, source):
        raise UserError(
            f"{stale[0].path}: was made from another model than {source.path}",
            fix="remove it, or run again into this folder",
        )
    return quantized.checkpoint_of(source), Run(source, _graphs(out), _engines(out))


def locked(out: Path) -> contextlib.AbstractContextManager[Any]:
    """Returns a lock on `out`, so that two runs never write into one folder."""
    from filelock import FileLock, Timeout

    with artifacts.writing_errors(out):
        artifacts.refuse_beneath_file(out)
        if out.is_dir() and any(out.iterdir()) and not (out / ".lock").exists() and not (out / "quantized").exists():
            raise UserError(f"{out}: is a folder that holds other things", fix="choose a new or an empty folder")
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"{out}: another run is writing here", fix="wait for it, or choose another --out"
            ) from error
    return lock
