"""Stage `validate`: holds every engine against the quantized PyTorch model, and that against the float one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from engines import backends
from engines.artifacts import Artifact, Json
from engines.plans import PLAN, read_plan
from engines.runner import Runner
from exporter import images, progress, quantized
from exporter.checkpoint import Checkpoint
from exporter.conditions import validation_entries
from exporter.layers import compare_layers
from exporter.metrics import finite, sqnr_db
from exporter.quantize import REFERENCE_ROWS, reference_feeds, reference_steps
from exporter.ranges import activation_of
from exporter.run_folder import Run
from exporter.runners import TorchRunner, in_chunks

FLOOR_MARGIN_DB = 3.0  # how far under the rounding floor an engine may fall: twice the noise power
# Where nothing rounds to codes the floor is that of one library's order of summation, and another that is as correct
# may lie some dB below: ONNX Runtime sums the 192 products behind an output of digits-dit one after the other, where
# torch sums them in lanes, and agrees to 125 … 131 dB under a floor of 127 … 138 dB. Anything above this is agreement.
FP32_AGREEMENT_DB = 120.0
# A small model flips few codes, perhaps none where its floor is measured and one in the engine: far under the floor,
# yet without consequence. What lies this far below the quantization error, a hundredth of its power, is let pass.
NEGLIGIBLE_DB = 20.0
# What a layer on its own must reach: two orders of summation in fp32 agree to 120 dB and more, in fp16 to 60; codes
# differ where a value lies within fp32's rounding of a boundary.
LAYER_DB, LAYER_CODES = 60.0, 1e-4
ACCURACY_MARGIN = 0.01  # of the float model's task score


def validate(checkpoint: Checkpoint, run: Run, folder: Path, *, seed: int = 0, count: int | None = None) -> Json:
    """Returns the report's content, without throughput; writes samples.png into `folder`. `count` is of images."""
    reference = load_file(run.quantized.file(quantized.REFERENCE))
    model = quantized.load(run.quantized)
    pytorch = TorchRunner("quantized", model, checkpoint.family)
    ours, refusals = open_runners(run)
    rows = checkpoint.family.rows(REFERENCE_ROWS)
    lowering = [r for name, runner in ours.items() for r in lowering_rows(runner, run.engines[name], reference, rows)]
    per_step = [row for runner in (pytorch, *ours.values()) for row in per_step_rows(runner, reference, run, rows)]
    quantization = _quantization_db(per_step)
    doubtful = [row for row in lowering if row["backend"] == "ort" and _is_doubtful(row, quantization)]
    for dtype in {row["dtype"] for row in doubtful}:
        agree = _layers_agree(run, dtype)
        for row in doubtful:
            row["layers_agree"] = row.get("layers_agree", True) and (agree or row["dtype"] != dtype)
    entries = validation_entries(checkpoint, run.quantized.info["entries"])
    trajectories, scores = images.judge(checkpoint, entries, pytorch, ours, folder, seed, count)
    report = {
        "schema_version": 1,
        "model": {
            key: run.quantized.info["model"][key] for key in ("name", "class", "parameters", "float_weight_bytes")
        },
        "recipe": run.quantized.info["recipe"],
        "training": run.quantized.info["training"],
        "weights": run.quantized.info["weights"],
        "activations": activation_counts(run.quantized.info),
        "engines": [engine_row(name, engine, folder, refusals) for name, engine in run.engines.items()],
        "accuracy": {"lowering": lowering, "per_step": per_step, "trajectory": trajectories, "images": scores},
    }
    report["checks"] = checks(report, run)
    report["passed"] = all(check["passed"] for check in report["checks"])
    return report


def activation_counts(info: Json) -> dict[str, dict[str, int]]:
    """Returns of how many layers, and products of attentions, activations are quantized in which way."""
    return {
        what: dict(Counter(activation_of(one) for one in info[key].values()))
        for what, key in (("layers", "layers"), ("attention_points", "points"))
    }


def open_runners(run: Run) -> tuple[dict[str, Runner], dict[str, str]]:
    """Returns the runners of the engines that can run on this machine, and why the others cannot."""
    runners, refusals = {}, {}
    for name, engine in run.engines.items():
        module = backends.load(name)
        reason = module.cannot_run()
        if reason is None:
            runners[name] = backends.open_runner(engine)
        else:
            refusals[name] = reason
            progress.note(f"{name}: built, not run: {reason}")
    return runners, refusals


def _quantization_db(per_step: Sequence[Json]) -> dict[int, float | None]:
    """Returns the quantized PyTorch model's SQNR against the float one, by step."""
    return {row["step"]: row["sqnr_db"] for row in per_step if row["runner"] == "quantized"}


def _is_doubtful(row: Json, quantization: Mapping[int, float | None]) -> bool:
    """Whether a row lies under its floor, yet no further off than quantization itself.

    Where one flipped code flips many behind it, a step's floor is a matter of luck: a row of the feed either has such a
    flip or has none. Then the layers decide, each on its own.
    """
    error_db = quantization.get(row["step"])
    if row["not_finite"] or row["sqnr_db"] is None or error_db is None:
        return False
    return _under(row, error_db) > FLOOR_MARGIN_DB and bool(row["sqnr_db"] >= error_db - FLOOR_MARGIN_DB)


def _layers_agree(run: Run, dtype: str) -> bool:
    """Whether every layer's nodes in the engine's graph give what PyTorch's layer gives, on the same inputs."""

    engine = run.engines["ort"]
    graph = Artifact(engine.path, engine.manifest | {"info": engine.info["graph"]})  # as it lies in the engine
    progress.note("lowering: under the floor at some step; comparing layer by layer")
    return all(
        (row["sqnr_db"] is None or row["sqnr_db"] >= LAYER_DB) and (row["codes_different"] or 0.0) <= LAYER_CODES
        for row in compare_layers(Run(run.quantized, {dtype: graph}, {}))
    )


def lowering_rows(
    runner: Runner, engine: Artifact, reference: Mapping[str, torch.Tensor], rows: int = REFERENCE_ROWS
) -> list[Json]:
    """Compares an engine with the quantized PyTorch model on the reference feeds, beside the rounding floor.

    An engine that is told the step is run on rows of all steps mixed; `per_step_rows` runs it on one step's at a time.
    """
    found = []
    dtype, steps = engine.info["dtype"], reference_steps(reference)
    mixed = run_mixed(runner, reference, rows) if engine.info["graph"]["step_input"] else {}
    for step in steps:
        output = mixed[step] if mixed else run_feeds(runner, reference, step, rows)
        expected = reference[f"{step}/quantized"]
        found.append(
            {
                "backend": runner.name,
                "dtype": dtype,
                "step": step,
                "sqnr_db": finite(sqnr_db(expected, output)),
                "floor_db": finite(floor_db(reference, step, dtype)),
                "max_abs": finite(float((expected - output).abs().max())),
                "not_finite": not_finite(output),
            }
        )
    return found


def floor_db(reference: Mapping[str, torch.Tensor], step: int, dtype: str) -> float:
    """Returns what rounding alone does: the quantized model in fp32 against fp64, or in fp16 against fp32."""
    fp32 = reference[f"{step}/quantized"]
    if dtype == "fp16":
        return sqnr_db(fp32, reference[f"{step}/quantized_fp16"])
    return sqnr_db(reference[f"{step}/quantized_fp64"], fp32)


def per_step_rows(
    runner: Runner, reference: Mapping[str, torch.Tensor], run: Run, rows: int = REFERENCE_ROWS
) -> list[Json]:
    """Compares one denoising call at a time with the float model."""
    found = []
    for step in reference_steps(reference):
        output = run_feeds(runner, reference, step, rows)
        value = finite(sqnr_db(reference[f"{step}/float"], output))
        timestep = run.quantized.info["timesteps"][step]
        found.append({"runner": runner.name, "step": step, "timestep": timestep, "sqnr_db": value})
    return found


def run_feeds(runner: Runner, reference: Mapping[str, torch.Tensor], step: int, rows: int) -> torch.Tensor:
    feeds = {name: value.numpy() for name, value in reference_feeds(reference, step).items()}
    return in_chunks(runner.run, feeds, rows)


def run_mixed(runner: Runner, reference: Mapping[str, torch.Tensor], rows: int) -> dict[int, torch.Tensor]:
    """Runs every step's feeds, a row of each in turn; returns each step's outputs."""
    steps = reference_steps(reference)
    each = [reference_feeds(reference, step) for step in steps]
    feeds = {name: torch.stack([one[name] for one in each], dim=1).flatten(0, 1).numpy() for name in each[0]}
    outputs = in_chunks(runner.run, feeds, rows)
    return {step: outputs[number :: len(steps)] for number, step in enumerate(steps)}


def engine_row(name: str, engine: Artifact, folder: Path, refusals: Mapping[str, str]) -> Json:
    rows = read_plan(engine)
    return {
        "backend": name,
        "dtype": engine.info["dtype"],
        "path": engine.path.relative_to(folder).as_posix(),
        "bytes": engine.bytes - engine.file(PLAN).stat().st_size,
        **{key: engine.info[key] for key in ("decode", "weight_bytes", "resident_weight_bytes")},
        "gpu": engine.info["gpu"],
        "ran": name not in refusals,
        "layers": [row.to_json() for row in rows],
    }


def checks(report: Json, run: Run) -> list[Json]:
    """Returns what decides `passed`: engines at their rounding floor, compression kept, classes kept."""
    quantization = _quantization_db(report["accuracy"]["per_step"])
    found = [
        check(
            f"lowering {row['backend']} step {row['step']} under its floor",
            math.inf if row["not_finite"] else _under(row, quantization.get(row["step"])),
            "dB",
            FLOOR_MARGIN_DB,
        )
        for row in report["accuracy"]["lowering"]
    ]
    for row in report["engines"]:
        graph = run.graphs[row["dtype"]].info["weight_bytes"]
        found.append(
            check(f"weights of {row['backend']} beyond the graph's", row["weight_bytes"] / graph - 1, "", 0.03)
        )
    scores = report["accuracy"]["images"]
    found.append(check(f"NaN or infinite values in the images of {scores['runner']}", scores["not_finite"], "", 0))
    if score := scores["task_score"]:
        found.append(check(f"{score['name']} lost", score["lost"]["mean"], "", ACCURACY_MARGIN))
    return found


def check(name: str, value: float, unit: str, limit: float) -> Json:
    """A check passes when its value is at most the limit; a value that is no number fails."""
    return {
        "name": name,
        "value": finite(value),
        "unit": unit,
        "limit": limit,
        "passed": not math.isnan(value) and value <= limit + 1e-9,
    }


def _under(row: Json, quantization_db: float | None) -> float:
    """Returns how far a lowering row lies under what is asked of it, in dB before the margin.

    Asked is its floor, or less where less is agreement in fp32, or negligible beside the quantization error.
    """
    if row["sqnr_db"] is None or row.get("layers_agree"):
        return 0.0  # equal to PyTorch bit for bit, or layer by layer
    asked = [math.inf if row["floor_db"] is None else row["floor_db"]]
    if row["dtype"] == "fp32":
        asked.append(FP32_AGREEMENT_DB + FLOOR_MARGIN_DB)
    if quantization_db is not None:
        asked.append(quantization_db + NEGLIGIBLE_DB + FLOOR_MARGIN_DB)
    return float(min(asked) - row["sqnr_db"])


def not_finite(tensor: torch.Tensor) -> int:
    """Returns how many values are NaN or infinite."""
    return int((~tensor.isfinite()).sum())
