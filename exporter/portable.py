"""A diffusers scheduler as six numbers to a step, so that Python without diffusers and C++ sample alike.

With latent x and prediction p, a step is x0 = x0_latent·x + x0_prediction·p, clipped, then
x ← next_x0·x0 + next_latent·x + next_prediction·p; the network is fed scale_input·x. docs/bundle.md holds the contract.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from engines.artifacts import Json

AGREE = 1e-4  # of a latent of unit size: six products in fp32 against diffusers' own order of them
TRIED = 64  # numbers that each step is tried on


def portable(scheduler: Any) -> tuple[Json | None, str | None]:
    """Returns `{clip, steps}` of a scheduler whose timesteps are set, or None and why it has none.

    What it gives is held against the scheduler itself, on random numbers, at every step.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name not in STEPS:
        return None, f"{name} is none of {', '.join(STEPS)}"
    for key, served in UNSERVED.items():
        if config.get(key, served) != served:
            return None, f"{name} with {key} = {config[key]!r}"
    clip = float(config.clip_sample_range) if config.get("clip_sample", False) else None
    found = {"clip": clip, "steps": [_named(numbers) for numbers in STEPS[name](scheduler)]}
    apart = _apart(scheduler, found)
    return (found, None) if apart <= AGREE else (None, f"{name}'s steps come {apart:.1g} apart from diffusers'")


# What would make a step random, or more than six numbers.
UNSERVED = {"thresholding": False, "rescale_betas_zero_snr": False, "stochastic_sampling": False}
NAMES = ("scale_input", "x0_latent", "x0_prediction", "next_x0", "next_latent", "next_prediction")


def _named(numbers: tuple[Any, ...]) -> Json:
    return {name: float(value) for name, value in zip(NAMES, numbers, strict=True)}


def _ddim(scheduler: Any) -> list[tuple[Any, ...]]:
    """Source: Song et al., arXiv 2010.02502, equation 12 with σ = 0; Salimans and Ho, arXiv 2202.00512, for v."""
    found = []
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    for timestep in scheduler.timesteps.tolist():
        before = timestep - stride
        now = scheduler.alphas_cumprod[timestep].double()
        then = (scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod).double()
        a, b, c = now.sqrt(), (1 - now).sqrt(), (1 - then).sqrt()
        noise = {
            "epsilon": (1 / a, -b / a, 0.0, 1.0),
            "v_prediction": (a, -b, b, a),
            "sample": (0.0, 1.0, 1 / b, -a / b),
        }
        x0_latent, x0_prediction, noise_latent, noise_prediction = noise[scheduler.config.prediction_type]
        found.append((1.0, x0_latent, x0_prediction, then.sqrt(), c * noise_latent, c * noise_prediction))
    return found


def _euler(scheduler: Any) -> list[tuple[Any, ...]]:
    """Source: Karras et al., arXiv 2206.00364, algorithm 1, as diffusers' EulerDiscreteScheduler scales it."""
    found = []
    for sigma, after in zip(scheduler.sigmas[:-1].double(), scheduler.sigmas[1:].double(), strict=True):
        scale, move = 1 / (sigma**2 + 1).sqrt(), (after - sigma) / sigma
        x0 = {"epsilon": (1.0, -sigma), "v_prediction": (scale**2, -sigma * scale), "sample": (0.0, 1.0)}
        found.append((scale, *x0[scheduler.config.prediction_type], -move, 1 + move, 0.0))
    return found


def _flow(scheduler: Any) -> list[tuple[Any, ...]]:
    """Source: Lipman et al., arXiv 2210.02747: the prediction is the velocity, dx/dσ."""
    sigmas = scheduler.sigmas.double()
    return [(1.0, 0.0, 0.0, 0.0, 1.0, after - sigma) for sigma, after in pairwise(sigmas)]


STEPS = {
    "DDIMScheduler": _ddim,
    "EulerDiscreteScheduler": _euler,
    "FlowMatchEulerDiscreteScheduler": _flow,
}


def _apart(scheduler: Any, found: Json) -> float:
    """Returns how far one step of ours comes from one of diffusers', relative to the latent, at most."""
    generator, most = torch.Generator().manual_seed(0), 0.0
    for timestep, n in zip(scheduler.timesteps, found["steps"], strict=True):
        latent = torch.randn(1, 1, TRIED, generator=generator) * float(getattr(scheduler, "init_noise_sigma", 1.0))
        prediction = torch.randn(1, 1, TRIED, generator=generator)
        if hasattr(scheduler, "scale_model_input"):
            given = scheduler.scale_model_input(latent, timestep)
            most = max(most, float((given - n["scale_input"] * latent).abs().max()))
        theirs = scheduler.step(prediction, timestep, latent, return_dict=False)[0]
        start = n["x0_latent"] * latent + n["x0_prediction"] * prediction
        start = start if found["clip"] is None else start.clamp(-found["clip"], found["clip"])
        ours = n["next_x0"] * start + n["next_latent"] * latent + n["next_prediction"] * prediction
        most = max(most, float((ours - theirs).abs().max() / latent.abs().max().clamp(min=1.0)))
    return most
