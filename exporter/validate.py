"""Stage `validate`: holds every engine against the quantized PyTorch model, and that against the float one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from engines import backends
from engines.artifacts import Artifact, Json
from engines.plans import PLAN, constant_bytes, read_plan
from engines.runner import Runner
from exporter import progress, quantized
from exporter.checkpoint import Checkpoint
from exporter.metrics import class_accuracy, load_task_net, mean_ci95, psnr_db, sqnr_db
from exporter.quantize import reference_feeds, reference_steps
from exporter.runners import TorchRunner
from exporter.sampling import Call, denoise

IMAGES = 200  # judged per report: one image of another class is half a point of accuracy
BATCH = 50
SEED_OFFSET = 1_000_000  # validation's noise shares no key with calibration's samples 0, 1, …
FLOOR_MARGIN_DB = 3.0  # how far under the rounding floor an engine may fall: twice the noise power
# Where nothing rounds to codes the floor is that of one library's order of summation, and another that is as correct
# may lie some dB below: ONNX Runtime sums the 192 products behind an output of digits-dit one after the other, where
# torch sums them in lanes, and agrees to 125 … 131 dB under a floor of 127 … 138 dB. Anything above this is agreement.
FP32_AGREEMENT_DB = 120.0
# A small model flips few codes, perhaps none where its floor is measured and one in the engine: far under the floor,
# yet without consequence. What lies this far below the quantization error, a hundredth of its power, is let pass.
NEGLIGIBLE_DB = 20.0
ACCURACY_MARGIN = 0.01  # of the float model's class accuracy


@dataclass(frozen=True)
class Run:
    """The artifacts of one run."""

    quantized: Artifact
    graphs: Mapping[str, Artifact]
    engines: Mapping[str, Artifact]


def validate(checkpoint: Checkpoint, run: Run, folder: Path, *, seed: int = 0) -> Json:
    """Returns the report's content, without throughput; writes samples.png into `folder`."""
    reference = load_file(run.quantized.file(quantized.REFERENCE))
    model = quantized.load(run.quantized)
    pytorch = TorchRunner("quantized", model, checkpoint.family)
    ours, refusals = open_runners(run)
    lowering = [row for name, runner in ours.items() for row in lowering_rows(runner, run.engines[name], reference)]
    per_step = [row for runner in (pytorch, *ours.values()) for row in per_step_rows(runner, reference, run)]
    trajectories, images = judge_images(checkpoint, pytorch, ours, folder, seed)
    report = {
        "schema_version": 1,
        "model": {
            key: run.quantized.info["model"][key] for key in ("name", "class", "parameters", "float_weight_bytes")
        },
        "recipe": run.quantized.info["recipe"],
        "weights": run.quantized.info["weights"],
        "engines": [engine_row(name, engine, folder, refusals) for name, engine in run.engines.items()],
        "accuracy": {"lowering": lowering, "per_step": per_step, "trajectory": trajectories, "images": images},
    }
    report["checks"] = checks(report, run)
    report["passed"] = all(check["passed"] for check in report["checks"])
    return report


def open_runners(run: Run) -> tuple[dict[str, Runner], dict[str, str]]:
    """Returns the runners of the engines that can run on this machine, and why the others cannot."""
    runners, refusals = {}, {}
    for name, engine in run.engines.items():
        module = backends.load(name)
        reason = module.cannot_run()
        if reason is None:
            runners[name] = module.open_runner(engine)
        else:
            refusals[name] = reason
            progress.note(f"{name}: built, not run: {reason}")
    return runners, refusals


def lowering_rows(runner: Runner, engine: Artifact, reference: Mapping[str, torch.Tensor]) -> list[Json]:
    """Compares an engine with the quantized PyTorch model on the reference feeds, beside the rounding floor."""
    rows = []
    dtype = engine.info["dtype"]
    for step in reference_steps(reference):
        output = run_feeds(runner, reference, step)
        expected = reference[f"{step}/quantized"]
        rows.append(
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
    return rows


def floor_db(reference: Mapping[str, torch.Tensor], step: int, dtype: str) -> float:
    """Returns what rounding alone does: the quantized model in fp32 against fp64, or in fp16 against fp32."""
    fp32 = reference[f"{step}/quantized"]
    if dtype == "fp16":
        return sqnr_db(fp32, reference[f"{step}/quantized_fp16"])
    return sqnr_db(reference[f"{step}/quantized_fp64"], fp32)


def per_step_rows(runner: Runner, reference: Mapping[str, torch.Tensor], run: Run) -> list[Json]:
    """Compares one denoising call at a time with the float model."""
    rows = []
    for step in reference_steps(reference):
        output = run_feeds(runner, reference, step)
        value = finite(sqnr_db(reference[f"{step}/float"], output))
        timestep = run.quantized.info["timesteps"][step]
        rows.append({"runner": runner.name, "step": step, "timestep": timestep, "sqnr_db": value})
    return rows


def run_feeds(runner: Runner, reference: Mapping[str, torch.Tensor], step: int) -> torch.Tensor:
    feeds = {name: value.numpy() for name, value in reference_feeds(reference, step).items()}
    (output,) = runner.run(feeds).values()
    return torch.from_numpy(output)


def judge_images(
    checkpoint: Checkpoint, pytorch: TorchRunner, ours: Mapping[str, Runner], folder: Path, seed: int
) -> tuple[list[Json], Json]:
    """Samples from the same noise with the float model, the quantized one and an engine; returns trajectory and images.

    The images judged are those of the first engine that runs here, else PyTorch's.
    """
    from exporter.report import draw_samples

    float_runner = TorchRunner("float", checkpoint.load(), checkpoint.family)
    runners: list[Runner] = [float_runner, pytorch, *ours.values()]
    judged = next(iter(ours.values()), pytorch)
    chunks = [range(i, min(i + BATCH, IMAGES)) for i in range(0, IMAGES, BATCH)]
    errors = {r.name: _StepErrors() for r in runners[1:]}
    finals: dict[str, list[torch.Tensor]] = {r.name: [] for r in runners}
    for chunk in progress.track(chunks, len(chunks), f"sampling {IMAGES} images"):
        indices = [SEED_OFFSET + i for i in chunk]
        for calls in zip(*(denoise(r, checkpoint, indices, seed) for r in runners), strict=True):
            for runner, call in zip(runners[1:], calls[1:], strict=True):
                errors[runner.name].add(calls[0], call)
        for runner, call in zip(runners, calls, strict=True):
            finals[runner.name].append(call.latent)
    images = {name: torch.cat(parts) for name, parts in finals.items()}
    draw_samples(images["float"], images[judged.name], judged.name, folder / "samples.png")
    trajectory = [row for runner in runners[1:] for row in errors[runner.name].rows(runner.name)]
    return trajectory, image_scores(checkpoint, judged.name, images["float"], images[judged.name])


class _StepErrors:
    """Sums squared latents and squared differences per step, so that no trajectory is kept."""

    def __init__(self) -> None:
        self._sums: dict[int, list[float]] = {}

    def add(self, reference: Call, call: Call) -> None:
        sums = self._sums.setdefault(reference.step, [0.0, 0.0])
        sums[0] += float(reference.latent.double().square().sum())
        sums[1] += float((reference.latent.double() - call.latent.double()).square().sum())

    def rows(self, runner: str) -> list[Json]:
        return [
            {
                "runner": runner,
                "step": step,
                "sqnr_db": 10 * math.log10(signal / noise) if 0 < noise < math.inf else None,
            }
            for step, (signal, noise) in self._sums.items()
        ]


def image_scores(checkpoint: Checkpoint, runner: str, reference: torch.Tensor, other: torch.Tensor) -> Json:
    """Returns PSNR with its interval, and the task score where the model ships a task network."""
    data_range = 2.0 if checkpoint.in_pixels else float(reference.max() - reference.min())
    mean, interval = mean_ci95(psnr_db(reference, other, data_range))
    scores: Json = {"runner": runner, "n": len(reference), "psnr_db": {"mean": mean, "ci95": interval}}
    scores["not_finite"] = not_finite(other)
    scores["task_score"] = None
    labels = checkpoint.family.labels(checkpoint.config, [SEED_OFFSET + i for i in range(len(reference))])
    if checkpoint.task_net and labels is not None:
        net = load_task_net(checkpoint.task_net)
        scores["task_score"] = {
            "float": class_accuracy(net, reference, labels),
            "quantized": class_accuracy(net, other, labels),
        }
    return scores


def engine_row(name: str, engine: Artifact, folder: Path, refusals: Mapping[str, str]) -> Json:
    rows = read_plan(engine)
    return {
        "backend": name,
        "dtype": engine.info["dtype"],
        "path": engine.path.relative_to(folder).as_posix(),
        "bytes": engine.bytes - engine.file(PLAN).stat().st_size,
        "weight_bytes": constant_bytes(rows),
        "gpu": engine.info["gpu"],
        "ran": name not in refusals,
        "layers": [row.to_json() for row in rows],
    }


def checks(report: Json, run: Run) -> list[Json]:
    """Returns what decides `passed`: engines at their rounding floor, compression kept, classes kept."""
    quantization = {r["step"]: r["sqnr_db"] for r in report["accuracy"]["per_step"] if r["runner"] == "quantized"}
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
    images = report["accuracy"]["images"]
    found.append(check(f"NaN or infinite values in the images of {images['runner']}", images["not_finite"], "", 0))
    if score := report["accuracy"]["images"]["task_score"]:
        found.append(check("class accuracy lost", score["float"] - score["quantized"], "", ACCURACY_MARGIN))
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
    if row["sqnr_db"] is None:
        return 0.0  # equal to PyTorch bit for bit: nothing to be under
    asked = [math.inf if row["floor_db"] is None else row["floor_db"]]
    if row["dtype"] == "fp32":
        asked.append(FP32_AGREEMENT_DB + FLOOR_MARGIN_DB)
    if quantization_db is not None:
        asked.append(quantization_db + NEGLIGIBLE_DB + FLOOR_MARGIN_DB)
    return float(min(asked) - row["sqnr_db"])


def not_finite(tensor: torch.Tensor) -> int:
    """Returns how many values are NaN or infinite."""
    return int((~tensor.isfinite()).sum())


def finite(value: float) -> float | None:
    """JSON has no infinity: an infinite dB, of equal tensors, is null."""
    return value if math.isfinite(value) else None
