"""Runs for a gate, as plain data: what `export-engine run` would leave, without a model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from engines import artifacts
from engines.artifacts import Request
from exporter.baseline import Measured, Speed

SPREAD_DB = 3.4  # of one image's PSNR about the mean, in digits-dit's recipe fp8
ENGINE = {"backend": "ort", "gpu": None}
DIGESTS = {"model": "a" * 64, "recipe": "b" * 64, "quantized": "c" * 64, "engine ort": "d" * 64}


def scores(images=256, *, seed=0, lost_db=0.0, spread_db=SPREAD_DB, worse=0):
    """Returns scores by image; `worse` images do not show what was asked, where the float model's do."""
    rng = np.random.default_rng(seed)
    psnr = 48 + spread_db * rng.standard_normal(images) - lost_db
    closeness = 0.02 * 10 ** (-(psnr - 40) / 20)
    return {
        "psnr_db": psnr.tolist(),
        "ssim": (1 - closeness).tolist(),
        "cosine": (1 - closeness / 4).tolist(),
        "task_score": [1.0] * worse + [0.0] * (images - worse),
    }


def measured(**changed):
    """Returns a run of 256 images whose engine takes as long as the float model, to within a percent or so."""
    made = Measured(
        model="net", recipe="fp8", digests=DIGESTS, versions={"torch": "2.13.0"}, machine="one, 2 cores", runner="ort",
        seed=0, captions="e" * 64, scores=scores(), speeds={"ort batch 8": Speed(1.0, (1.02, 1.02))},
        weights={"the model": 1000, "ort": 1100},
    )  # fmt: skip
    return replace(made, **changed)


def made_run(
    folder, *, model="a" * 64, recipe="fp8", source="b" * 64, seed=0, lost_db=0.0, images=256, ms=20.0, **more
):
    """Writes a run's artifacts and its report; `more` changes the report. Returns the folder."""
    made_from = {"model": model, "recipe": source, "calibration": "f" * 64}
    info = {"sampler": {}, "entries": ["0", "1"]}
    quantized = made(folder / "quantized", "quantized", made_from, info, f"{model}{source}{lost_db}")
    graph = made(folder / "graph" / "fp32", "graph", {"quantized": quantized.digest}, {}, "graph")
    engine = made(folder / "engines" / "ort", "engine", {"graph": graph.digest}, ENGINE, "engine")
    report = a_report(recipe, source, seed, scores(images, seed=seed, lost_db=lost_db), ms)
    report["made_from"] = {"quantized": quantized.digest, "engine ort": engine.digest}
    artifacts.write_json(folder / "report.json", report | more)
    return folder


def made(path, kind, made_from, info, content):
    with artifacts.drafting(path, Request(kind, made_from, {}, {"export_engine": "0.1.0", "torch": "2.13.0"})) as draft:
        (draft.path / "content").write_text(content)
        draft.info = info
    return artifacts.open_artifact(path, kind)


def a_report(recipe, source, seed, by_image, ms):
    def entry(values):
        return {"mean": float(np.mean(values)), "ci95": [0, 0], "noise_floor": 0, "per_image": values}

    found = {name: entry(values) for name, values in by_image.items()}
    task = {"name": "class accuracy", "float": 1.0, "quantized": 1.0, "lost": found.pop("task_score")}
    return {
        "schema_version": 1,
        "model": {"name": "net"},
        "recipe": {"name": recipe, "digest": source},
        "weights": {"bytes": 1000},
        "engines": [{"backend": "ort", "weight_bytes": 1100}],
        "accuracy": {"images": {"runner": "ort", "n": len(by_image["ssim"]), **found, "task_score": task}},
        "settings": {"seed": seed},
        "throughput": [
            {"runner": name, "batch": 8, "ms_p50": p50, "ms_p95": 1.02 * p50, "runs": 30}
            for name, p50 in (("float", 40.0), ("quantized", 90.0), ("ort", ms))
        ],
        "checks": [a_check("lowering ort step 0 under its floor", -3.0)],
    }


def a_check(name, value, passed=True):
    return {"name": name, "value": value, "unit": "dB", "limit": 3.0, "passed": passed}
