"""The sampler: drives any runner through a diffusers scheduler, with or without guidance, seeded per sample."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from engines.errors import UserError, unknown
from engines.runner import Runner
from exporter.checkpoint import Checkpoint


@dataclass(frozen=True)
class Call:
    """One denoising call: what the network was given and gave, and the latent after it, [n, …]."""

    step: int
    timestep: float
    feeds: dict[str, NDArray[Any]]
    output: NDArray[np.float32]
    latent: torch.Tensor


def scheduler_for(checkpoint: Checkpoint) -> Any:
    """Builds the checkpoint's diffusers scheduler, its timesteps set to the sampler's number of steps."""
    import diffusers

    name = str(checkpoint.scheduler.get("_class_name", ""))
    known = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    if name not in known:
        raise unknown("scheduler", name, known, str(checkpoint.root))
    try:
        scheduler = getattr(diffusers, name).from_config(checkpoint.scheduler)
    except (TypeError, ValueError, KeyError, NotImplementedError) as error:
        raise UserError(
            f"{checkpoint.root}: {name} refuses its config ({error})", fix="mend the scheduler's config"
        ) from error
    steps = checkpoint.sampler["steps"]
    limit = int(scheduler.config.num_train_timesteps)
    if not isinstance(steps, int) or not 1 <= steps <= limit:
        raise UserError(f"{checkpoint.name}: {steps} sampling steps", fix=f"use 1 … {limit} (--steps)")
    scheduler.set_timesteps(steps)
    return scheduler


def timesteps(checkpoint: Checkpoint) -> list[float]:
    """Returns the timestep given to the model at every step."""
    return [float(t) for t in scheduler_for(checkpoint).timesteps]


def generator(seed: int, index: int, purpose: str) -> torch.Generator:
    """Returns a generator keyed by seed, sample and purpose, so that a sample does not depend on its batch."""
    key = hashlib.sha256(f"{seed}/{index}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


def noise(seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> torch.Tensor:
    """Returns the samples' starting noise, [n, *shape]."""
    return torch.stack([torch.randn(shape, generator=generator(seed, i, "noise")) for i in indices])


def denoise(runner: Runner, checkpoint: Checkpoint, indices: Sequence[int], seed: int) -> Iterator[Call]:
    """Runs the sampler for the samples `indices`, yielding after every step."""
    family, config = checkpoint.family, checkpoint.config
    scheduler = scheduler_for(checkpoint)
    guidance = float(checkpoint.sampler["guidance_scale"])
    conditions = family.conditions(config, indices)
    if guidance != 1.0:
        null = family.conditions(config, indices, null=True)
        conditions = {name: torch.cat([value, null[name]]) for name, value in conditions.items()}
    latent = noise(seed, indices, family.latent_shape(config)) * scheduler.init_noise_sigma
    extra = _step_arguments(scheduler, seed, indices)
    for step, timestep in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(latent, timestep)
        if guidance != 1.0:
            model_input = torch.cat([model_input, model_input])
        tensors = family.feeds(model_input, timestep.expand(len(model_input)), conditions)
        feeds = {name: tensor.numpy() for name, tensor in tensors.items()}
        feeds["step"] = np.full(len(model_input), step, dtype=np.int64)
        output = runner.run(feeds)[family.OUTPUT]
        prediction = family.prediction(config, torch.from_numpy(output))
        if guidance != 1.0:
            wanted, unwanted = prediction.chunk(2)
            prediction = unwanted + guidance * (wanted - unwanted)
        latent = scheduler.step(prediction, timestep, latent, **extra, return_dict=False)[0]
        yield Call(step, float(timestep), feeds, output, latent)


def _step_arguments(scheduler: Any, seed: int, indices: Sequence[int]) -> dict[str, Any]:
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return {}
    return {"generator": [generator(seed, i, "steps") for i in indices]}


def sample(runner: Runner, checkpoint: Checkpoint, indices: Sequence[int], seed: int) -> torch.Tensor:
    """Returns the finished samples, [n, …]."""
    latent = None
    for call in denoise(runner, checkpoint, indices, seed):
        latent = call.latent
    return cast(torch.Tensor, latent)
