"""A scheduler's six numbers to a step give what diffusers' own scheduler gives, along a whole trajectory."""

from __future__ import annotations

import diffusers
import pytest
import torch

from exporter.portable import portable

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def scheduler(name, steps=7, **config):
    made = getattr(diffusers, name)(**config)
    made.set_timesteps(steps)
    return made


def prediction(latent):
    """Stands for a network: something that depends on the latent, and not linearly."""
    return torch.sin(3 * latent) + 0.1


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDIMScheduler", {"clip_sample": False}),
        ("DDIMScheduler", {"clip_sample": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
        ("DDIMScheduler", {"clip_sample_range": 0.5, "prediction_type": "sample", "set_alpha_to_one": False}),
        ("DDIMScheduler", {"steps_offset": 1, "clip_sample": False, **BETAS}),
        ("EulerDiscreteScheduler", BETAS),
        ("EulerDiscreteScheduler", {"prediction_type": "v_prediction", "timestep_spacing": "leading", **BETAS}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True, **BETAS}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ],
)
def test_a_trajectory_is_that_of_diffusers(name, config):
    made = scheduler(name, **config)
    found, why_not = portable(made)
    assert why_not is None
    theirs = ours = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(1)) * float(
        getattr(made, "init_noise_sigma", 1.0)
    )
    made = scheduler(name, **config)
    for timestep, n in zip(made.timesteps, found["steps"], strict=True):
        given = made.scale_model_input(theirs, timestep) if hasattr(made, "scale_model_input") else theirs
        theirs = made.step(prediction(given), timestep, theirs, return_dict=False)[0]
        p = prediction(n["scale_input"] * ours)
        x0 = n["x0_latent"] * ours + n["x0_prediction"] * p
        x0 = x0 if found["clip"] is None else x0.clamp(-found["clip"], found["clip"])
        ours = n["next_x0"] * x0 + n["next_latent"] * ours + n["next_prediction"] * p
    # fp32 in another order, through seven steps of a function that is steeper than a network
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "config", "told"),
    [
        ("DDPMScheduler", {}, "DDPMScheduler is none of DDIMScheduler"),
        ("DDIMScheduler", {"thresholding": True}, "thresholding = True"),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "stochastic_sampling = True"),
    ],
)
def test_what_is_no_such_step_has_none_and_says_why(name, config, told):
    found, why_not = portable(scheduler(name, **config))
    assert found is None
    assert told in why_not


def test_numbers_that_do_not_give_the_schedulers_step_are_not_given_out(monkeypatch):
    from exporter import portable as module

    monkeypatch.setitem(module.STEPS, "DDIMScheduler", lambda made: [(1.0, 0.0, 0.0, 0.0, 1.0, 0.0)] * 7)
    found, why_not = portable(scheduler("DDIMScheduler"))
    assert found is None
    assert "apart from diffusers'" in why_not
