"""The sampler: seeded per sample, with and without guidance, for any runner."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from families import family

from engines.errors import UserError
from exporter.checkpoint import open_checkpoint
from exporter.conditions import Conditions, calibration_entries
from exporter.runners import TorchRunner
from exporter.sampling import denoise, noise, sample, scheduler_for, timesteps


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return open_checkpoint(str(tiny_folder), steps=4)


@pytest.fixture(scope="module")
def runner(tiny):
    return TorchRunner("float", tiny.load(), tiny.family)


@pytest.fixture(scope="module")
def conditions(tiny):
    return Conditions(tiny, calibration_entries(tiny, None))


def guided(tiny, scale):
    return replace(tiny, sampler=tiny.sampler | {"guidance_scale": scale})


def test_a_sample_does_not_depend_on_its_batch(tiny, runner, conditions):
    together, alone = (sample(runner, tiny, conditions, indices, seed=7) for indices in ([3, 4, 5], [4]))
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=0)  # matmuls of other sizes sum in other orders


def test_noise_differs_by_seed_and_sample_and_is_repeatable():
    first = noise(0, [0, 1], (1, 8, 8))
    assert torch.equal(first, noise(0, [0, 1], (1, 8, 8)))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, noise(1, [0, 1], (1, 8, 8)))


def test_every_call_carries_its_step_and_timestep(tiny, runner, conditions):
    calls = list(denoise(runner, tiny, conditions, [0, 1], seed=0))
    assert [call.step for call in calls] == [0, 1, 2, 3]
    assert [call.timestep for call in calls] == timesteps(tiny)
    for call in calls:
        assert call.feeds["step"].tolist() == [call.step] * 2
        assert call.feeds["timestep"].tolist() == [call.timestep] * 2


def test_guidance_doubles_the_batch_with_the_null_class(tiny, runner, conditions):
    call = next(denoise(runner, guided(tiny, 4.0), conditions, [2, 3], seed=0))
    assert call.feeds["class_labels"].tolist() == [2, 3, 10, 10]
    np.testing.assert_array_equal(call.feeds["hidden_states"][:2], call.feeds["hidden_states"][2:])


class Constant:
    """A runner whose prediction is 1 for a class and 0 for none."""

    name = "constant"

    def run(self, feeds):
        wanted = (feeds["class_labels"] < 10).astype(np.float32)
        return {"sample": np.broadcast_to(wanted[:, None, None, None], feeds["hidden_states"].shape).copy()}


def test_guidance_of_scale_g_steps_with_u_plus_g_times_the_difference(tiny, conditions):
    class Scaled(Constant):
        def run(self, feeds):
            return {"sample": np.full(feeds["hidden_states"].shape, 3.0, np.float32)}

    # u + 3 (c − u) with u = 0 and c = 1 is 3, so the two must walk the same way; fp32's own arithmetic, exactly
    wanted = sample(Scaled(), tiny, conditions, [0], 0)
    assert torch.equal(sample(Constant(), guided(tiny, 3.0), conditions, [0], 0), wanted)


@pytest.mark.parametrize("steps", [0, 1001])
def test_a_number_of_steps_the_scheduler_lacks_is_refused(tiny, steps):
    with pytest.raises(UserError, match=str(steps)):
        scheduler_for(replace(tiny, sampler=tiny.sampler | {"steps": steps}))


def test_an_unknown_scheduler_is_refused_with_close_names(tiny):
    with pytest.raises(UserError, match="DDIMScheduler"):
        scheduler_for(replace(tiny, scheduler={"_class_name": "DDIMSheduler"}))


@pytest.mark.parametrize("name", ["ScoreSdeVeScheduler", "RePaintScheduler", "KarrasVeScheduler"])
def test_a_scheduler_that_is_stepped_by_more_than_a_prediction_is_refused(name, tiny):
    with pytest.raises(UserError, match=f"{name} is not stepped by a prediction"):
        scheduler_for(replace(tiny, scheduler={"_class_name": name}))


def test_a_scheduler_whose_own_library_is_not_there_is_refused_with_its_name(tiny, monkeypatch):
    def lacking(*_):
        raise ImportError("DPMSolverSDEScheduler requires the torchsde library")

    monkeypatch.setattr("diffusers.DPMSolverSDEScheduler.from_config", lacking)
    with pytest.raises(UserError, match="requires the torchsde library"):
        scheduler_for(replace(tiny, scheduler={"_class_name": "DPMSolverSDEScheduler"}))


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
             "PNDMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler",
             "HeunDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"],
)  # fmt: skip
def test_the_usual_schedulers_are_taken(name, tiny):
    with_fractions = replace(tiny, family=family("unet"), scheduler={"_class_name": name})
    assert len(scheduler_for(with_fractions).timesteps) >= 4
