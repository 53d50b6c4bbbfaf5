"""The sampling loop without torch: its steps, guidance, and what it refuses."""

from __future__ import annotations

import bundles
import numpy as np
import pytest

import engines
from engines import sampling
from engines.errors import UserError

NOISE = np.random.default_rng(0).standard_normal((2, *bundles.SHAPE), dtype=np.float32)
LABELS = {"class_labels": np.array([1, 2])}
NONE = {"class_labels": np.array([0, 0])}


def test_every_step_is_its_six_numbers(tmp_path):
    numbers = {
        "scale_input": 0.5, "x0_latent": 0.25, "x0_prediction": 2.0, "next_x0": 0.75, "next_latent": 0.125,
        "next_prediction": -0.5,
    }  # fmt: skip

    def edit(info):
        info["sampler"]["portable"] = {"clip": 1.0, "steps": [numbers] * 3}
        info["sampler"]["latent"]["init_noise_sigma"] = 3.0

    engine, seen = engines.load(bundles.tiny_bundle(tmp_path / "tiny", edit=edit)), []
    found = engine.sample(NOISE, LABELS, watch=lambda step, latent: seen.append((step, latent)))
    x = 3.0 * NOISE.astype(np.float64)
    for _ in range(3):
        p = 0.5 * (0.5 * x) + LABELS["class_labels"][:, None, None, None]
        x = 0.75 * np.clip(0.25 * x + 2.0 * p, -1, 1) + 0.125 * x - 0.5 * p
    np.testing.assert_allclose(found, x, rtol=1e-5, atol=1e-6)  # fp32 against fp64, a few sums
    assert [step for step, _ in seen] == [0, 1, 2]
    np.testing.assert_array_equal(seen[-1][1], found)


def test_guidance_runs_both_halves_in_one_batch(tmp_path):
    engine = engines.load(bundles.tiny_bundle(tmp_path / "tiny", guided=True))
    x = NOISE.astype(np.float64)
    for _ in range(3):
        wanted, unwanted = (0.5 * x + rows["class_labels"][:, None, None, None] for rows in (LABELS, NONE))
        x = x - 0.25 * (unwanted + 2.0 * (wanted - unwanted))
    np.testing.assert_allclose(engine.sample(NOISE, LABELS, NONE), x, rtol=1e-5, atol=1e-6)


def test_every_step_is_told_its_number(tmp_path):
    engine = engines.load(bundles.tiny_bundle(tmp_path / "tiny", step_input="index"))
    x = NOISE.astype(np.float64)
    for step in range(3):
        x = x - 0.25 * (0.5 * x + LABELS["class_labels"][:, None, None, None] + step)
    np.testing.assert_allclose(engine.sample(NOISE, LABELS), x, rtol=1e-5, atol=1e-6)


def test_guidance_without_its_other_half_is_refused(tmp_path):
    engine = engines.load(bundles.tiny_bundle(tmp_path / "tiny", guided=True))
    with pytest.raises(UserError, match="guidance 2") as caught:
        engine.sample(NOISE, LABELS)
    assert "unwanted" in caught.value.fix


def test_noise_of_another_shape_is_refused(tmp_path):
    engine = engines.load(bundles.tiny_bundle(tmp_path / "tiny"))
    with pytest.raises(UserError, match=r"\[2, 2, 4\]") as caught:
        engine.sample(NOISE[:, 0], LABELS)
    assert "[n, 1, 2, 4]" in caught.value.fix


def test_a_sampler_that_needs_diffusers_says_why(tmp_path):
    def edit(info):
        info["sampler"] |= {"portable": None, "why_not_portable": "DDPMScheduler is random"}

    engine = engines.load(bundles.tiny_bundle(tmp_path / "tiny", edit=edit))
    with pytest.raises(UserError, match="DDPMScheduler is random"):
        engine.sample(NOISE, LABELS)


@pytest.mark.parametrize(
    ("wanted", "unwanted"),
    [
        ({"class_labels": np.array([1])}, NONE),
        ({"class_labels": np.int64(1)}, {"class_labels": np.int64(0)}),
        (LABELS, {}),
        (LABELS, {"class_labels": np.array([[0], [0]])}),
        (LABELS, NONE | {"other": np.array([0, 0])}),
    ],
)
def test_rows_that_are_not_one_for_each_sample_are_refused(tmp_path, wanted, unwanted):
    engine = engines.load(bundles.tiny_bundle(tmp_path / "tiny", guided=True))
    with pytest.raises(UserError, match="there are 2 samples"):
        engine.sample(NOISE, wanted, unwanted)


def test_a_network_that_gives_other_latents_than_it_takes_is_refused():
    class Narrow:
        inputs, axes = bundles.info()["inputs"], bundles.AXES

        def run(self, feeds):
            return {"sample": feeds["hidden_states"][:, :, :1]}

    with pytest.raises(UserError, match=r"gives \[2, 1, 1, 4\] for latents \[2, 1, 2, 4\]"):
        sampling.sample(Narrow(), bundles.info()["sampler"], NOISE, LABELS)


@pytest.mark.parametrize("guided", [False, True])
def test_more_rows_than_a_call_takes_are_sampled_in_parts(tmp_path, guided):
    engine, shown = engines.load(bundles.tiny_bundle(tmp_path / "tiny", guided=guided)), []
    noise = np.random.default_rng(1).standard_normal((19, *bundles.SHAPE), dtype=np.float32)
    wanted, unwanted = {"class_labels": np.arange(19)}, {"class_labels": np.zeros(19, np.int64)} if guided else None
    found = engine.sample(noise, wanted, unwanted, watch=lambda step, latent: shown.append((step, len(latent))))
    sizes = [4, 4, 4, 4, 3] if guided else [8, 8, 3]  # of 8 rows in a call
    assert shown == [(step, size) for size in sizes for step in range(3)]
    for row in range(19):
        other = None if unwanted is None else {"class_labels": [0]}
        alone = engine.sample(noise[row : row + 1], {"class_labels": [row]}, other)
        np.testing.assert_array_equal(found[row : row + 1], alone)


def test_tensors_and_lists_are_sampled_as_arrays_are(tmp_path):
    import torch

    engine = engines.load(bundles.tiny_bundle(tmp_path / "tiny", guided=True))
    expected = engine.sample(NOISE, LABELS, NONE)
    tensors = engine.sample(torch.from_numpy(NOISE), {"class_labels": torch.tensor([1, 2])}, {"class_labels": [0, 0]})
    np.testing.assert_array_equal(tensors, expected)
    np.testing.assert_array_equal(engine.sample(NOISE.tolist(), {"class_labels": [1, 2]}, NONE), expected)


@pytest.mark.parametrize(
    ("noise", "told"),
    [
        (NOISE * np.float32(np.nan), "noise holds NaN"),
        (NOISE * np.float32(np.inf), "noise holds infinity"),
        (NOISE.astype(str), "noise is of type <U"),
    ],
)
def test_noise_that_is_no_numbers_is_refused(tmp_path, noise, told):
    with pytest.raises(UserError, match=told) as caught:
        engines.load(bundles.tiny_bundle(tmp_path / "tiny")).sample(noise, LABELS)
    assert "standard normal" in caught.value.fix


@pytest.mark.parametrize("name", ["timestep", "step", "hidden_states"])
def test_rows_of_what_the_sampler_feeds_are_refused(tmp_path, name):
    with pytest.raises(UserError, match=f"hold {name}, which the sampler feeds") as caught:
        engines.load(bundles.tiny_bundle(tmp_path / "tiny")).sample(NOISE, LABELS | {name: np.array([900, 900])})
    assert "leave it out" in caught.value.fix


def test_unwanted_rows_without_guidance_are_refused(tmp_path):
    with pytest.raises(UserError, match="without guidance, and unwanted rows came"):
        engines.load(bundles.tiny_bundle(tmp_path / "tiny")).sample(NOISE, LABELS, NONE)


def test_rows_that_are_no_dictionary_are_refused(tmp_path):
    with pytest.raises(UserError, match="wanted rows are a list"):
        engines.load(bundles.tiny_bundle(tmp_path / "tiny")).sample(NOISE, [1, 2])
