"""Stage `bundle`: run → everything an application loads. docs/bundle.md is the format."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from calib_data.tensors import save_tensors
from engines import artifacts, schedule
from engines.artifacts import Artifact, Json, Request
from engines.backends import ort
from engines.bundle import FORMAT_VERSION, KIND, Bundle, open_bundle
from engines.bundle_shape import GOLDEN
from engines.contract import STEP
from engines.errors import UserError
from engines.loading import with_versions
from engines.plans import PLAN
from engines.zipped import is_packed, pack
from exporter import quantized
from exporter.checkpoint import Checkpoint
from exporter.checks import FLOOR_MARGIN_DB, FP32_AGREEMENT_DB, NEGLIGIBLE_DB, SEED_MARGIN_DB, passes
from exporter.conditions import Conditions, validation_entries
from exporter.images import SEED_OFFSET, SHOWN
from exporter.metrics import sqnr_db
from exporter.models import TensorSpec
from exporter.pipeline import vae_digest, write_pipeline
from exporter.portable import portable
from exporter.quantize import RECIPE, reference_feeds, reference_steps
from exporter.run_folder import REPORT, Run, open_run
from exporter.sampling import noise, scheduler_for
from exporter.validate import floor_db
from exporter.versions import versions

PICTURE_DB = 60.0  # what two loops of the same calls differ by: the order of a step's sums, in fp32
PICTURES = 4  # samples that are recorded whole
LICENCES = ("LICENSE", "LICENSE.md", "LICENSE.txt")
MAX_TEXT_BYTES = 1 << 20  # of a card or a licence
MODEL = "model.onnx"

# What each input is fed, and in which unit.
MEANS = {
    "hidden_states": "the noisy latent, times the step's scale_input",
    "sample": "the noisy latent, times the step's scale_input",
    "timestep": "the sampler's timestep, as in sampler.timesteps",
    "step": "position in the sampler's schedule, 0 is the first and noisiest call",
    "class_labels": "number of the class that is wanted",
    "encoder_hidden_states": "the text encoder's states, token by token",
    "encoder_attention_mask": "1 for tokens that count, 0 for padding",
    "text_embeds": "the text encoder's pooled state",
    "pooled_projections": "the text encoders' pooled states",
    "time_ids": "original height and width, top and left of the crop, target height and width, in pixels",
    "guidance": "the guidance scale that the model was distilled for",
    "img_ids": "0, row and column of every token of the picture",
    "txt_ids": "zeros, as many as text tokens",
}


def bundle(folder: Path, out: Path, *, engines: Sequence[Path] = (), failed: bool = False) -> Artifact:
    """Writes what a validated run holds, and further `engines` built of its graphs, as a bundle.

    A run whose checks failed is refused, unless `failed`.
    """
    checkpoint, run = open_run(folder)
    report = _report(folder, run, failed)
    built = _engines(run, engines)
    made_from = {"quantized": run.quantized.digest} | {f"engine {name}": one.digest for name, one in built.items()}
    settings = {
        "report": artifacts.digest_json([report["checks"], report["accuracy"]["images"], report["shown"]]),
        "vae": vae_digest(checkpoint),
    }
    request = Request(KIND, made_from, settings, versions("torch", "diffusers", "transformers", "tokenizers"))
    if (made := artifacts.current(out, request)) is not None:
        return made
    with artifacts.drafting(out, request) as draft:
        draft.timed = False  # a bundle holds nothing that its manifest does not seal
        draft.info = _info(checkpoint, run, report)
        draft.info["graphs"] = _place_graphs(run, built, draft.path)
        draft.info["engines"] = {name: _place_engine(name, one, draft.path) for name, one in built.items()}
        draft.info["golden"], draft.info["pipeline"] = _write_golden(checkpoint, run, report, folder, draft.path)
        _place_texts(checkpoint, run, draft.path)
    return open_bundle(out).artifact


def _report(folder: Path, run: Run, failed: bool) -> Json:
    """Returns the run's report, which must be of what lies there, and must have passed."""
    again = f"export-engine validate {folder}"
    if not (folder / REPORT).is_file():
        raise UserError(f"{folder}: was not validated: it has no {REPORT}", fix=again)
    report = artifacts.read_json(folder / REPORT)
    if report.get("made_from") != run.judged:
        raise UserError(f"{folder / REPORT}: is of other engines than lie there", fix=again)
    if not (folder / SHOWN).is_file() or report.get("shown") != artifacts.digest_file(folder / SHOWN):
        raise UserError(f"{folder / SHOWN}: is not what {REPORT} judged, or is missing", fix=again)
    if not report["passed"] and not failed:
        wrong = [check["name"] for check in report["checks"] if not check["passed"]]
        raise UserError(
            f"{folder}: {len(wrong)} of its checks failed: {wrong[0]}",
            fix="mend it (see report.html), or bundle it all the same with --failed",
        )
    return report


def _engines(run: Run, folders: Sequence[Path]) -> dict[str, Artifact]:
    """Returns the run's engines and further ones, by backend and GPU."""
    found = [*run.engines.values(), *(artifacts.open_artifact(folder, "engine") for folder in folders)]
    graphs = {graph.digest for graph in run.graphs.values()}
    named: dict[str, Artifact] = {}
    for engine in found:
        if engine.manifest["made_from"]["graph"] not in graphs:
            raise UserError(
                f"{engine.path}: was built of another graph than this run's",
                fix="build it of RUN/graph/…, and try again",
            )
        name = "-".join(filter(None, (engine.info["backend"], engine.info["gpu"])))
        if name in named and named[name].digest != engine.digest:
            raise UserError(f"{engine.path}: there is another engine {name} already", fix="leave one of the two out")
        named[name] = engine
    if not named:
        raise UserError("the run holds no engine", fix="build one: export-engine build RUN/graph/… --backend …")
    return named


def _info(checkpoint: Checkpoint, run: Run, report: Json) -> Json:
    graph = next(iter(run.graphs.values())).info
    family = checkpoint.family
    specs = [*family.inputs(), *([TensorSpec(STEP, "int64", ("batch",))] if graph["step_input"] else [])]
    inputs: list[Json] = [
        {"name": s.name, "dtype": s.dtype, "shape": list(s.shape), "means": MEANS.get(s.name, s.name)}
        | ({} if s.largest is None else {"largest": s.largest})
        for s in specs
    ]
    output = family.output()
    return {
        "format_version": FORMAT_VERSION,
        "model": {key: run.quantized.info["model"][key] for key in ("name", "class", "config", "parameters")},
        "recipe": graph["recipe"],
        "inputs": inputs,
        "output": {"name": output.name, "dtype": output.dtype, "shape": list(output.shape)},
        "axes": graph["axes"],
        "sampler": _sampler(checkpoint),
        "checks": report["checks"],
        "scores": _scores(report["accuracy"]["images"]),
    }


def _scores(images: Json) -> Json:
    """Returns the scores of a report without those of single images."""
    return {
        key: {k: v for k, v in value.items() if k != "per_image"} if isinstance(value, dict) else value
        for key, value in images.items()
        if key != "task_score"
    } | {"task_score": {k: v for k, v in (images["task_score"] or {}).items() if k != "lost"} or None}


def _sampler(checkpoint: Checkpoint) -> Json:
    family, scheduler = checkpoint.family, scheduler_for(checkpoint)
    guidance = float(checkpoint.sampler["guidance_scale"])
    sigma, schedule_ = float(getattr(scheduler, "init_noise_sigma", 1.0)), [float(t) for t in scheduler.timesteps]
    steps, why_not = portable(scheduler)
    return {
        "scheduler": checkpoint.scheduler,
        "steps": len(schedule_),
        "guidance_scale": guidance,
        "guided": guidance != 1.0 and family.guided(),
        "latent": {
            "input": family.inputs()[0].name,
            "shape": list(family.latent_shape()),
            "init_noise_sigma": sigma,
            "pixels": checkpoint.in_pixels,
        },
        "schedule": schedule_,
        "timesteps": family.fed_timesteps(schedule_),
        "portable": steps,
        "why_not_portable": why_not,
    }


def _place_graphs(run: Run, built: dict[str, Artifact], root: Path) -> dict[str, Json]:
    """Copies graphs, but for those that are an engine's own file, and says where each lies."""
    found = {}
    for dtype, graph in run.graphs.items():
        same = [n for n, one in built.items() if one.manifest["files"].get(MODEL) == graph.manifest["files"][MODEL]]
        folder = f"engines/{same[0]}" if same else f"graph/{dtype}"
        if not same:
            _copy(graph, [n for n in graph.files() if n.startswith(MODEL) or n == schedule.FILE], root / folder)
        found[dtype] = {"folder": folder, "digest": graph.digest, "info": graph.info}
    return found


def _place_engine(name: str, engine: Artifact, root: Path) -> Json:
    folder = f"engines/{name}"
    _copy(engine, engine.files(), root / folder)
    info = with_versions(engine).info
    keys = (
        "backend",
        "gpu",
        "dtype",
        "decode",
        "refit",
        "weight_streaming",
        "versions",
        "weight_bytes",
        "resident_weight_bytes",
    )
    return {
        "folder": folder,
        "file": next(file for file in engine.files() if file not in (PLAN, schedule.FILE)),
        "digest": engine.digest,
        "step_input": info["graph"]["step_input"],
        "session": ort.session_record(info["graph"]) if info["backend"] == "ort" else None,
        **{key: info[key] for key in keys},
    }


def _copy(artifact: Artifact, names: Sequence[str], folder: Path) -> None:
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        ort.link_or_copy(artifact.file(name), target)


def _write_golden(checkpoint: Checkpoint, run: Run, report: Json, folder: Path, root: Path) -> tuple[Json, Json | None]:
    """Writes recorded feeds and outputs, whole samples, and the rest of a pipeline, if the model is part of one.

    Returns what of the recorded an engine must give, and what there is of the pipeline.
    """
    reference = load_file(run.quantized.file(quantized.REFERENCE))
    steps = reference_steps(reference)
    tensors = {
        f"{step}/feeds/{name}": value for step in steps for name, value in reference_feeds(reference, step).items()
    }
    tensors |= {f"{step}/expected": reference[f"{step}/quantized"] for step in steps}
    limits = {dtype: {str(s): _limit_db(reference, s, dtype, report) for s in steps} for dtype in run.graphs}
    picture, recorded, captions = _pictures(checkpoint, run, report, folder, limits)
    pipeline, drawn = write_pipeline(checkpoint, captions, recorded["latent"], list(run.graphs), root)
    tensors |= {f"picture/{name}": value for name, value in (recorded | drawn).items()}
    save_tensors({name: value.contiguous() for name, value in tensors.items()}, root / GOLDEN)
    (root / GOLDEN).chmod(0o644)  # as the other files: bundles are handed on
    return {"steps": steps, "limits_db": limits, "picture": picture}, pipeline


def _limit_db(reference: Any, step: int, dtype: str, report: Json) -> float:
    """Returns what an engine must reach at a step: what the report's check asks of it, or what it was excused with.

    What a check failed excuses nothing.
    """
    quantization = sqnr_db(reference[f"{step}/float"], reference[f"{step}/quantized"])
    asked = [floor_db(reference, step, dtype) - FLOOR_MARGIN_DB, FP32_AGREEMENT_DB, quantization + NEGLIGIBLE_DB]
    rows = [row for row in report["accuracy"]["lowering"] if (row["step"], row["dtype"]) == (step, dtype)]
    passed = [row for row in rows if row["sqnr_db"] is not None and passes(row, {step: quantization})]
    measured = [row["sqnr_db"] - FLOOR_MARGIN_DB for row in passed]
    return float(min([value for value in (*asked, *measured) if math.isfinite(value)]))


def _pictures(
    checkpoint: Checkpoint, run: Run, report: Json, folder: Path, limits: dict[str, dict[str, float]]
) -> tuple[Json, dict[str, torch.Tensor], list[str]]:
    """Returns the first samples that the report judged: their noise, conditions and finished latents, and captions."""
    runner, family = report["accuracy"]["images"]["runner"], checkpoint.family
    shown = load_file(folder / SHOWN)[runner]
    count = min(PICTURES, len(shown))
    indices = [SEED_OFFSET + i for i in range(count)]
    conditions = Conditions(checkpoint, validation_entries(checkpoint, run.quantized.info["entries"]))
    conditions.read(indices)
    recorded = {"noise": noise(report["settings"]["seed"], indices, family.latent_shape()), "latent": shown[:count]}
    guidance = float(checkpoint.sampler["guidance_scale"])
    halves = [("wanted", False)] + [("unwanted", True)] * (guidance != 1.0 and family.guided())
    for half, null in halves:
        feeds = family.feeds(recorded["noise"], torch.zeros(count), conditions.of(indices, null=null), guidance)
        for name, value in feeds.items():
            if name not in (family.inputs()[0].name, "timestep"):
                recorded[f"{half}/{name}"] = value
    peak = 2.0 if checkpoint.in_pixels else float(shown.max() - shown.min()) or 1.0  # of samples that are all alike
    # an engine whose flips move samples so far may as well draw another seed's
    floor = report["accuracy"]["images"]["psnr_db"]["noise_floor"] + SEED_MARGIN_DB
    least = {dtype: max(floor, min(PICTURE_DB, *by_step.values())) for dtype, by_step in limits.items()}
    picture = {"runner": runner, "count": count, "limits_db": least, "peak": peak}
    return picture, recorded, conditions.asked(indices)


def _place_texts(checkpoint: Checkpoint, run: Run, root: Path) -> None:
    """Copies the recipe, and the model's card and licence where its folder holds them."""
    shutil.copyfile(run.quantized.file(RECIPE), root / RECIPE)
    for name in ("README.md", *LICENCES):
        file = checkpoint.root / name
        if file.is_file() and file.stat().st_size <= MAX_TEXT_BYTES:
            shutil.copyfile(file, root / name)


def bundle_zip(folder: Path, out: Path, *, engines: Sequence[Path] = (), failed: bool = False) -> Artifact:
    """Writes a run's bundle as one uncompressed zip, over nothing but another of ours."""
    if os.path.lexists(out) and (out.is_symlink() or not out.is_file() or not is_packed(out)):
        raise UserError(f"{out}: is there, and no bundle of ours", fix="name a new file, such as model.zip")
    with _beside(out) as place:
        made = bundle(folder, place / out.stem, engines=engines, failed=failed)
        pack(made.path, out)
        return Artifact(out, made.manifest)


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """Yields a temporary folder on the disk of `out`."""
    with artifacts.writing_errors(out):
        artifacts.refuse_beneath_file(out.parent)
        out.parent.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(dir=out.parent, prefix=".bundle-")
    with place as name:
        yield Path(name)


@contextlib.contextmanager
def opened(
    folder: Path, out: Path | None, *, near: Path, engines: Sequence[Path] = (), failed: bool = False
) -> Iterator[Bundle]:
    """Yields the bundle at `out`; without one, a run's, in a temporary folder beside `near`."""
    if out is not None:
        yield open_bundle(out)
        return
    with _beside(near) as place:
        bundle(folder, place / "bundle", engines=engines, failed=failed)
        yield open_bundle(place / "bundle")


def check_places(out: Path | None, packed: bool, triton: Path | None) -> None:
    """Refuses places that would lie in each other's way, and a folder that is called like a file."""
    if out is None and (triton is None or packed):
        raise UserError("there is nowhere to write to", fix="give --out, --triton, or both (--zip needs --out)")
    if out is not None and out.suffix == ".zip" and not packed:
        raise UserError(f"{out}: would be a folder by that name", fix="add --zip, or name a folder")
    if out is None or triton is None:
        return
    ours, theirs = out.resolve(), triton.resolve()
    if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
        raise UserError(f"--out {out} and --triton {triton}: one lies in the other", fix="name two folders apart")
