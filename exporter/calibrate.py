"""Stage `calibrate`: model → the denoiser's inputs at every step of its own sampling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from calib_data.store import ShardWriter, shard_name
from engines import artifacts
from engines.artifacts import Artifact, Draft, Request, digest_json
from engines.errors import UserError
from engines.memory import peak_rss_bytes
from engines.runner import Runner
from exporter import devices, progress
from exporter.checkpoint import Checkpoint
from exporter.conditions import Conditions, calibration_entries
from exporter.runners import TorchRunner
from exporter.sampling import denoise, timesteps
from exporter.versions import versions

BATCH = 16  # trajectories per shard, at most: bounds the memory that one shard takes while it is recorded


def calibrate(
    checkpoint: Checkpoint,
    out: Path,
    *,
    samples: int,
    seed: int = 0,
    record_steps: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    device: torch.device = devices.CPU,
) -> Artifact:
    """Records `samples` trajectories, at every step unless `record_steps` lists some; `prompts` are the user's own.

    They are sampled on `device`.
    """
    steps = _record_steps(checkpoint, record_steps)
    entries = calibration_entries(checkpoint, prompts)
    request = request_for(checkpoint, samples=samples, seed=seed, record_steps=record_steps, prompts=prompts)
    if (made := artifacts.current(out, request)) is not None:
        return made
    with artifacts.drafting(out, request, resumable=True) as draft, devices.memory():
        conditions = Conditions(checkpoint, entries)
        conditions.read(range(samples))
        devices.place(model := checkpoint.load(), device)
        runner = TorchRunner("float", model, checkpoint.family)
        rows = checkpoint.family.rows(BATCH)
        batches = [range(first, min(first + rows, samples)) for first in range(0, samples, rows)]
        for number, indices in enumerate(progress.track(batches, len(batches), "calibrating (batches)")):
            if not (draft.path / shard_name(number)).exists():  # a kill left it, whole
                _record(runner, checkpoint, conditions, indices, seed, steps, draft, number)
        draft.info = {
            "model": checkpoint.name,
            "samples": samples,
            "seed": seed,
            "timesteps": timesteps(checkpoint),  # position = step
            "record_steps": steps,
            "entries": entries,
            "sampler": checkpoint.sampler,
        }
        draft.timings |= {"peak_rss_bytes": peak_rss_bytes(), "device": devices.name(device)}
    return artifacts.open_artifact(out, "calibration")


def request_for(
    checkpoint: Checkpoint,
    *,
    samples: int,
    seed: int,
    record_steps: Sequence[int] | None,
    prompts: Sequence[str] | None,
) -> Request:
    """Returns what identifies a calibration set: equal requests, equal sets, whatever the recipe."""
    settings = {
        "samples": samples,
        "seed": seed,
        "record_steps": _record_steps(checkpoint, record_steps),
        "batch": checkpoint.family.rows(BATCH),
        "entries": digest_json(calibration_entries(checkpoint, prompts)),
    }
    return Request("calibration", {"model": checkpoint.digest}, settings, versions("torch", "diffusers"))


def _record_steps(checkpoint: Checkpoint, wanted: Sequence[int] | None) -> list[int]:
    count = len(timesteps(checkpoint))
    steps = sorted(set(wanted)) if wanted is not None else list(range(count))
    if steps[-1] >= count:
        raise UserError(f"record_steps lists step {steps[-1]}", fix=f"the sampler has steps 0 … {count - 1}")
    return steps


def _record(
    runner: Runner,
    checkpoint: Checkpoint,
    conditions: Conditions,
    indices: Sequence[int],
    seed: int,
    steps: Sequence[int],
    draft: Draft,
    number: int,
) -> None:
    shard = ShardWriter(draft.path, number)
    for call in denoise(runner, checkpoint, conditions, indices, seed):
        if bad := int((~np.isfinite(call.output)).sum()):
            raise UserError(
                f"{checkpoint.name}: the float model gives {bad} NaN or infinite values at step {call.step}",
                fix="the checkpoint or its sampler settings are wrong: it fails before anything is quantized",
            )
        if call.step in steps:
            shard.add(call.step, call.feeds)
    shard.close()
