"""Stage `validate`: holds every engine against the quantized PyTorch model, and that against the float one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from engines import backends
from engines.artifacts import Artifact, Json
from engines.audit import audit
from engines.loading import elsewhere
from engines.plans import PLAN, read_plan
from engines.runner import Runner
from exporter import devices, images, progress, quantized, taps
from exporter.checkpoint import Checkpoint
from exporter.checks import checks, is_doubtful, passes, quantization_db
from exporter.conditions import validation_entries
from exporter.histograms import worst_layers_histograms
from exporter.layers import compare_layers
from exporter.metrics import finite, sqnr_db
from exporter.modules import float_layers
from exporter.quantize import REFERENCE_ROWS, reference_feeds, reference_steps
from exporter.ranges import activation_of
from exporter.run_folder import Run
from exporter.runners import TorchRunner, in_chunks
from exporter.sampling import Call

# What a layer on its own must reach: two orders of summation in fp32 agree to 120 dB and more, in fp16 to 60; codes
# differ where a value lies within fp32's rounding of a boundary.
LAYER_DB, LAYER_CODES = 60.0, 1e-4
# What a report repeats of an engine.
ENGINE_FACTS = ("decode", "refit", "weight_streaming", "weight_bytes", "resident_weight_bytes")


def validate(
    checkpoint: Checkpoint,
    run: Run,
    folder: Path,
    *,
    seed: int = 0,
    count: int | None = None,
    device: torch.device = devices.CPU,
) -> Json:
    """Returns the report's content, without throughput; writes samples.png into `folder`. `count` is of images.

    PyTorch samples its images on `device`; what engines are held against layer by layer is computed on the CPU.
    """
    reference = load_file(run.quantized.file(quantized.REFERENCE))
    layers = list(float_layers(checkpoint.skeleton()))
    floats = _float_outputs(checkpoint, layers, reference)
    model = quantized.load(run.quantized)
    pytorch = TorchRunner("quantized", model, checkpoint.family)
    outputs = taps.record(pytorch, model, layers, reference)
    ours, refusals = open_runners(run)
    rows = checkpoint.family.rows(REFERENCE_ROWS)
    per_step = [row for runner in (pytorch, *ours.values()) for row in per_step_rows(runner, reference, run, rows)]
    lowering = [r for name, runner in ours.items() for r in lowering_rows(runner, run.engines[name], reference, rows)]
    lowering = _judged_by_layers(run, lowering, quantization_db(per_step))
    entries = validation_entries(checkpoint, run.quantized.info["entries"])
    devices.place(model, device)
    trajectories, scores, bad = images.judge(checkpoint, entries, pytorch, ours, folder, seed, count, device)
    failing = {row["backend"] for row in lowering if not passes(row, quantization_db(per_step))}
    origins = [one for name in failing for one in origins_of(run, name, outputs, reference)]
    origins += [_origin_of_nan(run, name, call, pytorch, layers) for name, call in bad.items()]
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
        "accuracy": {
            "lowering": lowering,
            "per_step": per_step,
            "layers": taps.compared("quantized", floats, outputs),
            "origins": origins,
            "trajectory": trajectories,
            "images": scores,
        },
    }
    rows = report["accuracy"]["layers"]
    report["histograms"] = worst_layers_histograms(checkpoint, run.quantized, rows)
    report["checks"] = checks(report)
    report["passed"] = all(check["passed"] for check in report["checks"])
    return report


def _float_outputs(checkpoint: Checkpoint, layers: Sequence[str], reference: taps.Reference) -> taps.Outputs:
    model = checkpoint.load()
    return taps.record(TorchRunner("float", model, checkpoint.family), model, layers, reference)


def _judged_by_layers(run: Run, rows: Sequence[Json], quantization: Mapping[int, float | None]) -> list[Json]:
    """Returns lowering rows, those that luck may have put under their floor with what the layers say of them."""
    doubtful = [row for row in rows if row["backend"] == "ort" and is_doubtful(row, quantization)]
    agree = {dtype: _layers_agree(run, dtype) for dtype in {row["dtype"] for row in doubtful}}
    return [row | ({"layers_agree": agree[row["dtype"]]} if row in doubtful else {}) for row in rows]


def origins_of(run: Run, name: str, outputs: taps.Outputs, reference: taps.Reference) -> list[Json]:
    """Returns, step by step, the first layer of an ONNX Runtime engine that is off; none where no layer is."""
    if name != "ort":
        return []
    layers = list(dict.fromkeys(layer for _, layer in outputs))
    dtype = torch.float64 if run.engines[name].info["dtype"] == "fp32" else torch.float16
    model = nn.Module.to(quantized.load(run.quantized), dtype)
    exact = taps.record(
        TorchRunner("exact", model, quantized.family(run.quantized), dtype=dtype), model, layers, reference
    )
    floors = taps.compared("floor", exact, outputs)
    rows = taps.compared(name, outputs, taps.record_engine(run.engines[name], layers, reference))
    found = [taps.origin([row for row in rows if row["step"] == step], floors) for step in reference_steps(reference)]
    return [one for one in found if one is not None]


def _origin_of_nan(run: Run, name: str, call: Call, pytorch: TorchRunner, layers: Sequence[str]) -> Json:
    """Returns the layer in which a runner's first NaN or infinity of a trajectory arises."""
    found = {"runner": name, "layer": None, "step": call.step, "sqnr_db": None, "not_finite": 0}
    found["not_finite"] = int((~np.isfinite(call.output)).sum())
    if name == pytorch.name:
        return found | {"layer": pytorch.first_not_finite(call.feeds)}
    if name != "ort":
        return found
    worst = np.argsort(np.isfinite(call.output).reshape(len(call.output), -1).all(axis=1), kind="stable")
    feeds = {f"{call.step}/feeds/{key}": torch.from_numpy(value[worst]) for key, value in call.feeds.items()}
    seen = taps.record_engine(run.engines[name], layers, feeds)
    return found | {"layer": next((layer for (_, layer), one in seen.items() if one.not_finite), None)}


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
        reason = elsewhere(engine)
        if reason is None:
            runners[name] = backends.open_runner(engine)
        else:
            refusals[name] = reason
            progress.note(f"{name}: built, not run: {reason}")
    return runners, refusals


def _layers_agree(run: Run, dtype: str) -> bool:
    """Whether every layer's nodes in the engine's graph give what PyTorch's layer gives, on the same inputs."""

    engine = run.engines["ort"]
    graph = Artifact(engine.path, engine.manifest | {"info": engine.info["graph"]})  # as it lies in the engine
    progress.note("lowering: under the floor at some step; comparing layer by layer")
    return all(
        not row["not_finite"]
        and (row["sqnr_db"] is None or row["sqnr_db"] >= LAYER_DB)
        and (row["codes_different"] or 0.0) <= LAYER_CODES
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
        row = {"runner": runner.name, "step": step, "timestep": timestep, "sqnr_db": value}
        found.append(row | {"not_finite": not_finite(output)})
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
        **{key: engine.info[key] for key in ENGINE_FACTS},
        "graph_weight_bytes": engine.info["graph"]["weight_bytes"],
        "gpu": engine.info["gpu"],
        "ran": name not in refusals,
        "audit": [row.to_json() for row in audit(engine)],
        "layers": [row.to_json() for row in rows],
    }


def not_finite(tensor: torch.Tensor) -> int:
    """Returns how many values are NaN or infinite."""
    return int((~tensor.isfinite()).sum())
