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
from exporter.checkpoint import Checkpoint, config_errors
from exporter.conditions import Conditions
from exporter.models import Family


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
    steps = checkpoint.sampler["steps"]
    with config_errors(checkpoint.root, f"{name} refuses its config"):
        scheduler = _made(getattr(diffusers, name), name, checkpoint)
        _check_driven(scheduler, name, checkpoint)
        limit = int(scheduler.config.num_train_timesteps)
        if not isinstance(steps, int) or not 1 <= steps <= limit:
            raise UserError(f"{checkpoint.name}: {steps} sampling steps", fix=f"use 1 … {limit} (--steps)")
        _set_timesteps(scheduler, steps, checkpoint.family)
    if _whole_timesteps(checkpoint) and any(float(t) % 1 for t in scheduler.timesteps):
        raise UserError(
            f"{checkpoint.root}: {name} gives timesteps with fractions; {checkpoint.family.CLASS} takes whole ones",
            fix="use a scheduler with whole timesteps, e.g. DDIMScheduler",
        )
    return scheduler


def _made(cls: Any, name: str, checkpoint: Checkpoint) -> Any:
    try:
        return cls.from_config(checkpoint.scheduler)
    except ImportError as error:  # of what diffusers itself does not require
        raise UserError(f"{checkpoint.root}: {name} cannot be used ({error})", fix="install what it names") from error


def _check_driven(scheduler: Any, name: str, checkpoint: Checkpoint) -> None:
    """Raises a UserError if a scheduler is stepped otherwise than by a prediction, or draws noise of its own."""
    step = getattr(scheduler, "step", None)
    parameters = list(inspect.signature(step).parameters.values()) if step else []
    asked = [one.name for one in parameters if one.default is inspect.Parameter.empty and one.kind != one.VAR_KEYWORD]
    if asked != ["model_output", "timestep", "sample"] or hasattr(scheduler, "noise_sampler"):
        raise UserError(
            f"{checkpoint.root}: {name} is not stepped by a prediction, a timestep and a sample alone",
            fix="use another scheduler that the model was trained for, e.g. DDIMScheduler",
        )


def _set_timesteps(scheduler: Any, steps: int, family: Family) -> None:
    """Sets the steps as the model's pipeline does; flow matching may shift its schedule by a latent's positions.

    Source: diffusers, FluxPipeline.calculate_shift: a line through (base_image_seq_len, base_shift) and
    (max_image_seq_len, max_shift).
    """
    config, arguments = scheduler.config, {}
    if config.get("use_dynamic_shifting", False):
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        arguments["mu"] = config.base_shift + slope * (family.tokens() - config.base_image_seq_len)
    sigmas = family.sigmas(steps)
    if sigmas is not None and "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(sigmas=sigmas, **arguments)
    else:
        scheduler.set_timesteps(steps, **arguments)


def _whole_timesteps(checkpoint: Checkpoint) -> bool:
    return any(spec.name == "timestep" and spec.dtype == "int64" for spec in checkpoint.family.inputs())


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


def denoise(
    runner: Runner, checkpoint: Checkpoint, conditions: Conditions, indices: Sequence[int], seed: int
) -> Iterator[Call]:
    """Runs the sampler for the samples `indices`, yielding after every step."""
    family = checkpoint.family
    scheduler = scheduler_for(checkpoint)
    guidance = float(checkpoint.sampler["guidance_scale"])
    twice = guidance != 1.0 and family.guided()
    rows = conditions.of(indices)
    if twice:
        null = conditions.of(indices, null=True)
        rows = {name: torch.cat([value, null[name]]) for name, value in rows.items()}
    latent = noise(seed, indices, family.latent_shape()) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    extra = _step_arguments(scheduler, seed, indices)
    for step, timestep in enumerate(scheduler.timesteps):
        scaled = hasattr(scheduler, "scale_model_input")  # flow matching has none
        model_input = scheduler.scale_model_input(latent, timestep) if scaled else latent
        if twice:
            model_input = torch.cat([model_input, model_input])
        tensors = family.feeds(model_input, timestep.expand(len(model_input)), rows, guidance)
        feeds = {name: tensor.numpy() for name, tensor in tensors.items()}
        feeds["step"] = np.full(len(model_input), step, dtype=np.int64)
        output = runner.run(feeds)[family.output().name]
        prediction = family.prediction(torch.from_numpy(output))
        if twice:
            wanted, unwanted = prediction.chunk(2)
            prediction = unwanted + guidance * (wanted - unwanted)
        latent = scheduler.step(prediction, timestep, latent, **extra, return_dict=False)[0]
        yield Call(step, float(timestep), feeds, output, latent)


def _step_arguments(scheduler: Any, seed: int, indices: Sequence[int]) -> dict[str, Any]:
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return {}
    return {"generator": [generator(seed, i, "steps") for i in indices]}


def sample(
    runner: Runner, checkpoint: Checkpoint, conditions: Conditions, indices: Sequence[int], seed: int
) -> torch.Tensor:
    """Returns the finished samples, [n, …]."""
    latent = None
    for call in denoise(runner, checkpoint, conditions, indices, seed):
        latent = call.latent
    return cast(torch.Tensor, latent)
