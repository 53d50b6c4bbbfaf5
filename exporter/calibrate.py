"""Stage `calibrate`: model → the denoiser's inputs at every step of its own sampling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from calib_data.store import ShardWriter, shard_name
from engines import artifacts
from engines.artifacts import Artifact, Draft, Request
from engines.errors import UserError
from engines.runner import Runner
from exporter import progress
from exporter.checkpoint import Checkpoint
from exporter.runners import TorchRunner
from exporter.sampling import denoise, timesteps
from exporter.versions import versions

BATCH = 16  # trajectories per shard: bounds the memory that one shard takes while it is recorded


def calibrate(
    checkpoint: Checkpoint, out: Path, *, samples: int, seed: int = 0, record_steps: Sequence[int] | None = None
) -> Artifact:
    """Records `samples` trajectories, at every step unless `record_steps` lists some."""
    steps = _record_steps(checkpoint, record_steps)
    settings = {"samples": samples, "seed": seed, "record_steps": steps, "batch": BATCH}
    request = Request("calibration", {"model": checkpoint.digest}, settings, versions("torch", "diffusers"))
    if (made := artifacts.current(out, request)) is not None:
        return made
    with artifacts.drafting(out, request, resumable=True) as draft:
        runner = TorchRunner("float", checkpoint.load(), checkpoint.family)
        batches = [range(first, min(first + BATCH, samples)) for first in range(0, samples, BATCH)]
        for number, indices in enumerate(progress.track(batches, len(batches), "calibrating (batches)")):
            if not (draft.path / shard_name(number)).exists():  # a kill left it, whole
                _record(runner, checkpoint, indices, seed, steps, draft, number)
        draft.info = {
            "model": checkpoint.name,
            "samples": samples,
            "seed": seed,
            "timesteps": timesteps(checkpoint),  # position = step
            "record_steps": steps,
            "sampler": checkpoint.sampler,
        }
    return artifacts.open_artifact(out, "calibration")


def _record_steps(checkpoint: Checkpoint, wanted: Sequence[int] | None) -> list[int]:
    count = len(timesteps(checkpoint))
    steps = sorted(set(wanted)) if wanted is not None else list(range(count))
    if steps[-1] >= count:
        raise UserError(f"record_steps lists step {steps[-1]}", fix=f"the sampler has steps 0 … {count - 1}")
    return steps


def _record(
    runner: Runner,
    checkpoint: Checkpoint,
    indices: Sequence[int],
    seed: int,
    steps: Sequence[int],
    draft: Draft,
    number: int,
) -> None:
    shard = ShardWriter(draft.path, number)
    for call in denoise(runner, checkpoint, indices, seed):
        if bad := int((~np.isfinite(call.output)).sum()):
            raise UserError(
                f"{checkpoint.name}: the float model gives {bad} NaN or infinite values at step {call.step}",
                fix="the checkpoint or its sampler settings are wrong: it fails before anything is quantized",
            )
        if call.step in steps:
            shard.add(call.step, call.feeds)
    shard.close()
