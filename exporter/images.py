"""Images: sampled by every runner from the same noise, and scored, each score with its interval and its noise floor.

The noise floor of a score is what it is between two sets that the float model draws for the same captions from
different noise: a quantized model that scores no worse than that cannot be told from another seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from calib_data.tensors import save_tensors
from engines.artifacts import Json, replacing
from engines.runner import Runner
from exporter import devices, metrics, progress, tasks
from exporter.checkpoint import Checkpoint
from exporter.conditions import Conditions
from exporter.runners import TorchRunner
from exporter.sampling import Call, denoise, sample

IMAGES = 256  # judged per report: one image of another class is 0.4 points of accuracy
TRAJECTORIES = 64  # whose error is followed step by step, for every runner
BATCH = 32  # at most; guidance doubles it
SEED_OFFSET = 1_000_000  # validation's noise shares no key with calibration's samples 0, 1, …
SHOWN = "samples.safetensors"  # the first images, by runner: what a report shows
NEIGHBOURS = 3  # of precision and recall
LEAST_SETS = 2 * (NEIGHBOURS + 1)  # images that scores of sets take: each half, of which intervals are, has neighbours


@dataclass(frozen=True)
class Pictures:
    """Images [n, …] for the same captions: the float model's, a runner's of the same noise, the float model's anew."""

    reference: torch.Tensor
    judged: torch.Tensor
    again: torch.Tensor
    asked: Sequence[str]


def judge(
    checkpoint: Checkpoint,
    entries: Sequence[str],
    pytorch: Runner,
    ours: Mapping[str, Runner],
    folder: Path,
    seed: int,
    count: int | None = None,
    device: torch.device = devices.CPU,
) -> tuple[list[Json], Json, dict[str, Call]]:
    """Returns the trajectory rows of all runners, the scores of the first engine that runs here, else PyTorch's, and of
    every runner that gives NaN or infinity its first call that does.

    `count` is of the images that are scored (default: IMAGES). The float model samples on `device`.
    """
    from exporter.report import PICTURES, draw_samples

    conditions = Conditions(checkpoint, entries)
    indices = [SEED_OFFSET + i for i in range(count or IMAGES)]
    conditions.read(indices)
    devices.place(model := checkpoint.load(), device)
    float_runner = TorchRunner("float", model, checkpoint.family)
    judged = next(iter(ours.values()), pytorch)
    others = {judged.name: judged, pytorch.name: pytorch, **ours}
    trajectory, first, bad = _trajectories(checkpoint, conditions, float_runner, others, indices[:TRAJECTORIES], seed)
    rest = indices[TRAJECTORIES:]
    jobs = [(float_runner, rest, seed), (judged, rest, seed), (float_runner, indices, seed + 1)]
    reference, images, again = (_sample(checkpoint, conditions, *job) for job in jobs)
    pictures = Pictures(
        torch.cat([first["float"], *reference]),
        torch.cat([first[judged.name], *images]),
        torch.cat(again),
        conditions.asked(indices),
    )
    draw_samples(pictures.reference, pictures.judged, judged.name, folder / "samples.png", checkpoint.in_pixels)
    shown = {"float": pictures.reference[:PICTURES], judged.name: pictures.judged[:PICTURES]}
    with replacing(folder / SHOWN) as temporary:
        save_tensors({name: images.contiguous() for name, images in shown.items()}, temporary)
    return trajectory, scores(checkpoint, judged.name, pictures), bad


def _sample(
    checkpoint: Checkpoint, conditions: Conditions, runner: Runner, indices: Sequence[int], seed: int
) -> list[torch.Tensor]:
    """Returns the samples' images, chunk by chunk."""
    chunks = _chunks(checkpoint, indices)
    tracked = progress.track(chunks, len(chunks), f"sampling {len(indices)} images ({runner.name})")
    return [sample(runner, checkpoint, conditions, chunk, seed) for chunk in tracked]


def _trajectories(
    checkpoint: Checkpoint,
    conditions: Conditions,
    float_runner: Runner,
    others: Mapping[str, Runner],
    indices: Sequence[int],
    seed: int,
) -> tuple[list[Json], dict[str, torch.Tensor], dict[str, Call]]:
    """Runs all samplers side by side, so that errors are summed step by step and no trajectory is kept."""
    runners = [float_runner, *others.values()]
    errors = {name: _StepErrors() for name in others}
    chunks = _chunks(checkpoint, indices)
    finals: dict[str, list[torch.Tensor]] = {runner.name: [] for runner in runners}
    for chunk in progress.track(chunks, len(chunks), f"trajectories of {len(indices)} images ({len(runners)} runners)"):
        for calls in zip(*(denoise(r, checkpoint, conditions, chunk, seed) for r in runners), strict=True):
            for name, call in zip(others, calls[1:], strict=True):
                errors[name].add(calls[0], call)
        for runner, call in zip(runners, calls, strict=True):
            finals[runner.name].append(call.latent)
    trajectory = [row for name, error in errors.items() for row in error.rows(name)]
    bad = {name: error.first_bad for name, error in errors.items() if error.first_bad is not None}
    return trajectory, {name: torch.cat(parts) for name, parts in finals.items()}, bad


def _chunks(checkpoint: Checkpoint, indices: Sequence[int]) -> list[Sequence[int]]:
    rows = checkpoint.family.rows(BATCH)
    return [indices[i : i + rows] for i in range(0, len(indices), rows)]


class _StepErrors:
    """Sums squared latents and squared differences per step; keeps the first call that gives NaN or infinity."""

    def __init__(self) -> None:
        self._sums: dict[int, list[float]] = {}
        self._not_finite: dict[int, int] = {}
        self.first_bad: Call | None = None

    def add(self, reference: Call, call: Call) -> None:
        sums = self._sums.setdefault(reference.step, [0.0, 0.0])
        sums[0] += float(reference.latent.double().square().sum())
        sums[1] += float((reference.latent.double() - call.latent.double()).square().sum())
        bad = int((~np.isfinite(call.output)).sum())
        self._not_finite[call.step] = self._not_finite.get(call.step, 0) + bad
        if bad and (self.first_bad is None or call.step < self.first_bad.step):
            self.first_bad = call

    def rows(self, runner: str) -> list[Json]:
        return [
            {
                "runner": runner,
                "step": step,
                "sqnr_db": 10 * math.log10(signal / noise) if 0 < noise < math.inf and signal else None,
                "not_finite": self._not_finite[step],
            }
            for step, (signal, noise) in self._sums.items()
        ]


def scores(checkpoint: Checkpoint, runner: str, pictures: Pictures) -> Json:
    """Returns every score of a set of images against the float model's."""
    laid_out = checkpoint.family.laid_out
    pictures = replace(
        pictures,
        reference=laid_out(pictures.reference), judged=laid_out(pictures.judged), again=laid_out(pictures.again),
    )  # fmt: skip
    span = float(pictures.reference.max() - pictures.reference.min())
    data_range = 2.0 if checkpoint.in_pixels else span or 1.0  # of latents that are all alike
    found: Json = {
        "runner": runner,
        "n": len(pictures.reference),
        "in_pixels": checkpoint.in_pixels,
        "not_finite": int((~pictures.judged.isfinite()).sum()),
        "psnr_db": _per_image(pictures, lambda a, b: metrics.psnr_db(a, b, data_range)),
        "ssim": _per_image(pictures, lambda a, b: metrics.ssim(a, b, data_range)),
        "cosine": _per_image(pictures, metrics.cosine),
        "task_score": None,
    }
    if (name := checkpoint.sampler.get("task")) is None:
        return found
    task = tasks.load(name, checkpoint.task_net)
    found["task_score"] = _task_score(task, pictures)
    if checkpoint.task_net and not found["not_finite"]:
        found["sets"] = _set_scores(task, pictures)
    return found


def _per_image(pictures: Pictures, score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Json:
    values = score(pictures.reference, pictures.judged.nan_to_num())
    mean, interval = metrics.bootstrap_ci95(values)
    floor = float(score(pictures.reference, pictures.again).mean())
    return {"mean": mean, "ci95": interval, "noise_floor": floor, "per_image": values.tolist()}


def _task_score(task: tasks.Task, pictures: Pictures) -> Json:
    """Returns the share of what was asked that is shown, and what quantization lost of it, image by image."""
    ours, theirs, again = (
        task.scores(images, pictures.asked) for images in (pictures.judged, pictures.reference, pictures.again)
    )
    lost, lost_interval = metrics.bootstrap_ci95(theirs - ours)
    _, interval = metrics.bootstrap_ci95(ours)
    return {
        "name": task.NAME_OF_SCORE,
        "float": float(theirs.mean()),
        "quantized": float(ours.mean()),
        "ci95": interval,
        "lost": {
            "mean": lost,
            "ci95": lost_interval,
            "noise_floor": abs(float((theirs - again).mean())),
            "per_image": (theirs - ours).tolist(),
        },
    }


def _set_scores(task: tasks.Task, pictures: Pictures) -> Json:
    """Returns Fréchet distance, precision and recall of the images' features against the float model's."""
    ours, theirs, again = (
        task.features(images).double() for images in (pictures.judged, pictures.reference, pictures.again)
    )
    if len(ours) < LEAST_SETS:
        progress.note(f"note: no Fréchet distance, precision and recall: {len(ours)} images, they take {LEAST_SETS}")
        return {}
    width = ours.shape[1]

    def paired(score: Callable[[torch.Tensor, torch.Tensor], float]) -> Callable[[torch.Tensor], float]:
        # the two sets are of the same noise: a resample takes both images of a sample, or none
        return lambda both: score(both[:, :width], both[:, width:])

    kinds: dict[str, Callable[[torch.Tensor, torch.Tensor], float]] = {
        "frechet_distance": metrics.frechet_distance,
        "precision": metrics.knn_precision,
        "recall": metrics.knn_recall,
    }
    found = {}
    for name, score in kinds.items():
        value, interval = metrics.bootstrap_ci95_of(paired(score), torch.cat([theirs, ours], dim=1))
        found[name] = {"value": value, "ci95": interval, "noise_floor": score(theirs, again)}
    return found
