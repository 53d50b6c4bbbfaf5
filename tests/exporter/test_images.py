"""Images: sampled side by side from the same noise, scored with intervals beside what two float runs differ by."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from families import family
from safetensors.torch import load_file

from calib_data import shapes, shipped
from exporter import images, page_tables
from exporter.checkpoint import open_checkpoint
from exporter.checks import SEED_MARGIN_DB, checks
from exporter.images import SEED_OFFSET, Pictures, judge, scores
from exporter.runners import TorchRunner

COUNT = 60
SETS = {"frechet_distance", "precision", "recall"}
AS_THEY_ARE = SimpleNamespace(laid_out=lambda samples: samples)
WITHOUT_TASK = SimpleNamespace(in_pixels=True, sampler={}, task_net=None, family=AS_THEY_ARE)
SHAPES = SimpleNamespace(
    in_pixels=True,
    sampler={"task": "shapes"},
    task_net=shipped.folder("shapes-unet") / "features.safetensors",
    family=AS_THEY_ARE,
)
CAPTIONS = [
    f"a {size} {colour} {shape} {place}"
    for size, colour, shape in zip(
        ("large", "small") * 6, ("red", "green", "blue", "white") * 3, ("circle", "square", "triangle") * 4, strict=True
    )
    for place in ("at the top", "in the center", "at the bottom", "at the left", "at the right")
]


def replaced(**changed):
    return SimpleNamespace(**(vars(WITHOUT_TASK) | changed))


def drawn(seed: int) -> torch.Tensor:
    """Pictures of all captions, placed and sized at random: what a perfect model draws from one noise."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([shapes.render(shapes.parse(caption), rng) for caption in CAPTIONS])).float()


@pytest.fixture(scope="module")
def reference():
    return drawn(0)


@pytest.fixture(scope="module")
def again():
    return drawn(1)


def pictures(reference, judged, again) -> Pictures:
    assert len(reference) == COUNT
    return Pictures(reference, judged, again, CAPTIONS)


def test_equal_images_have_the_best_of_every_score(reference, again):
    found = scores(SHAPES, "ort", pictures(reference, reference.clone(), again))
    assert (found["runner"], found["n"], found["not_finite"]) == ("ort", COUNT, 0)
    assert found["psnr_db"]["mean"] == 120.0  # the cap
    assert found["psnr_db"]["ci95"] == [120.0, 120.0]
    assert found["ssim"]["mean"] == pytest.approx(1.0)
    assert found["cosine"]["mean"] == pytest.approx(1.0)
    assert found["task_score"]["lost"]["mean"] == 0.0
    assert found["task_score"]["quantized"] == found["task_score"]["float"]
    assert found["sets"].keys() == SETS
    assert found["sets"]["frechet_distance"]["value"] == pytest.approx(0.0, abs=1e-6)
    assert found["sets"]["precision"]["value"] == found["sets"]["recall"]["value"] == 1.0


def test_images_of_other_noise_score_as_the_noise_floor_does(reference, again):
    found = scores(SHAPES, "ort", pictures(reference, drawn(2), again))
    # each is the mean of 60 pairs of independent pictures, as its floor is: the two differ by their spread alone
    for name in ("psnr_db", "ssim", "cosine"):
        entry = found[name]
        wide = entry["ci95"][1] - entry["ci95"][0]
        assert abs(entry["mean"] - entry["noise_floor"]) <= wide, name
    distance = found["sets"]["frechet_distance"]
    assert distance["noise_floor"] / 2 <= distance["value"] <= distance["noise_floor"] * 2
    for name in ("precision", "recall"):
        assert abs(found["sets"][name]["value"] - found["sets"][name]["noise_floor"]) <= 0.2, name


def test_a_small_error_lies_between_the_two(reference, again):
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(3))
    found = scores(SHAPES, "ort", pictures(reference, reference + 0.02 * noise, again))
    assert found["psnr_db"]["mean"] == pytest.approx(20 * np.log10(2 / 0.02), abs=0.1)  # of a range of 2
    low, high = found["psnr_db"]["ci95"]
    assert low < found["psnr_db"]["mean"] < high
    for name in ("psnr_db", "ssim", "cosine"):
        assert found[name]["mean"] > found[name]["noise_floor"], name
    assert found["sets"]["frechet_distance"]["value"] < found["sets"]["frechet_distance"]["noise_floor"]


def test_images_of_something_else_lose_what_was_asked(reference, again):
    found = scores(SHAPES, "ort", pictures(reference, reference.roll(7, 0), again))["task_score"]
    assert found["name"] == "attribute accuracy"
    assert found["float"] > 0.95
    assert found["lost"]["mean"] == pytest.approx(found["float"] - found["quantized"])
    assert found["lost"]["ci95"][0] > found["lost"]["noise_floor"]


def likeness(images):
    """Returns the check that images are the float model's, of a model without a task."""
    accuracy = {"per_step": [], "lowering": [], "origins": [], "trajectory": [], "images": images}
    report = {"engines": [], "accuracy": accuracy}
    _, found = checks(report)
    assert "another seed's images" in found["name"]
    return found


@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_images_near_the_float_models_pass_without_a_task(noise, reference, again):
    near = reference + noise * torch.randn(reference.shape, generator=torch.Generator().manual_seed(3))
    found = likeness(scores(WITHOUT_TASK, "ort", pictures(reference, near, again)))
    assert found["passed"]
    assert found["detail"] is None


def test_images_that_show_nothing_of_the_float_models_fail_without_a_task(reference, again):
    nothing = {
        "black": torch.full_like(reference, -1.0),
        "gray": torch.zeros_like(reference),
        "of another sample": reference.roll(7, 0),
        "of another seed": drawn(2),
        "noise": torch.randn(reference.shape, generator=torch.Generator().manual_seed(3)),
    }
    for name, images_ in nothing.items():
        found = likeness(scores(WITHOUT_TASK, "ort", pictures(reference, images_, again)))
        assert not found["passed"], name
        assert found["limit"] == -SEED_MARGIN_DB
        assert "dB against the float model's of the same noise; float against float" in found["detail"], name


def test_nan_in_the_pictures_of_an_engine_that_is_not_scored_fails_too(reference, again):
    found = scores(WITHOUT_TASK, "ort", pictures(reference, reference.clone(), again))
    rows = [{"runner": name, "step": step, "sqnr_db": None} for name in ("ort", "trt") for step in (0, 1)]
    trajectory = [row | {"not_finite": 3 * (row["runner"] == "trt" and row["step"] == 1)} for row in rows]
    origins = [{"runner": "trt", "layer": "conv_out", "step": 1, "sqnr_db": None, "not_finite": 3}]
    accuracy = {"per_step": [], "lowering": [], "origins": origins, "trajectory": trajectory, "images": found}
    (failed,) = [one for one in checks({"engines": [], "accuracy": accuracy}) if not one["passed"]]
    assert failed["name"] == "NaN or infinite values along the trajectories of trt"
    assert failed["value"] == 3
    assert "'conv_out' at step 1" in failed["detail"]
    (table,) = [one for one in page_tables.steps(accuracy) if one["caption"].startswith("Along the trajectory")]
    assert [row[2]["text"] for row in table["rows"]] == ["equal", "equal", "equal", "NaN"]


def test_a_model_that_draws_one_picture_whatever_the_noise_passes_where_it_is_equal(reference):
    assert likeness(scores(WITHOUT_TASK, "ort", pictures(reference, reference.clone(), reference)))["passed"]
    off = reference + 0.1
    assert not likeness(scores(WITHOUT_TASK, "ort", pictures(reference, off, reference)))["passed"]


def test_latents_that_are_packed_into_tokens_are_scored_as_they_lie():
    flux = family("flux-dev")
    latents = torch.randn(9, *flux.latent_shape(), generator=torch.Generator().manual_seed(0))
    laid_out = flux.laid_out(latents)
    assert laid_out.shape[1:] == (flux.config["in_channels"] // 4, *[2 * int(latents.shape[1] ** 0.5)] * 2)
    side = laid_out.shape[-1]
    theirs = FluxPipeline._unpack_latents(latents, 8 * side, 8 * side, 8)  # of a VAE that halves three times
    assert torch.equal(laid_out, theirs)
    off = latents + 0.01
    found = scores(replaced(in_pixels=False, family=flux), "ort", Pictures(latents, off, latents.flip(0), CAPTIONS[:9]))
    assert 0.9 < found["ssim"]["mean"] < 1
    assert found["ssim"]["noise_floor"] < 0.5


def test_latents_that_are_all_alike_have_scores_that_are_numbers(reference):
    latent, flat = replaced(in_pixels=False), torch.zeros_like(reference)
    found = scores(latent, "ort", pictures(flat, flat.clone(), flat))
    assert found["psnr_db"]["mean"] == 120.0
    json.dumps(found, allow_nan=False)


def test_too_few_images_for_scores_of_sets_are_told(reference, again, capsys):
    least = images.LEAST_SETS
    few = (reference[:least], reference[:least].clone(), again[:least], CAPTIONS[:least])
    assert scores(SHAPES, "ort", Pictures(*few))["sets"].keys() == SETS
    assert capsys.readouterr().err == ""
    fewer = scores(SHAPES, "ort", Pictures(*(part[1:] for part in few)))
    assert fewer["sets"] == {}
    assert "no Fréchet distance, precision and recall: 7 images, they take 8" in capsys.readouterr().err


def test_images_with_nan_are_counted_scored_and_kept_out_of_sets(reference, again):
    broken = reference.clone()
    broken[3], broken[5, 0, 0, 0] = float("nan"), float("inf")
    found = scores(SHAPES, "ort", pictures(reference, broken, again))
    assert found["not_finite"] == 3 * 32 * 32 + 1
    assert "sets" not in found
    assert found["task_score"]["lost"]["mean"] > 0
    json.dumps(found, allow_nan=False)


def test_images_that_are_all_nan_give_a_report_that_is_still_json(reference, again):
    found = scores(SHAPES, "ort", pictures(reference, torch.full_like(reference, float("nan")), again))
    json.dumps(found, allow_nan=False)
    assert found["not_finite"] == reference.numel()


def test_latents_are_measured_against_their_own_range_and_have_no_task(reference, again):
    latent = replaced(in_pixels=False)
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(3))
    found = scores(latent, "ort", pictures(10 * reference, 10 * (reference + 0.02 * noise), 10 * again))
    spread = float(reference.max() - reference.min())
    assert found["psnr_db"]["mean"] == pytest.approx(20 * np.log10(spread / 0.02), abs=0.1)
    assert found["task_score"] is None
    assert "sets" not in found


@pytest.fixture
def tiny(tiny_folder, monkeypatch):
    for name, value in (("IMAGES", 7), ("TRAJECTORIES", 4), ("BATCH", 3)):
        monkeypatch.setattr(images, name, value)
    return open_checkpoint(str(tiny_folder), steps=3)


def test_every_runner_draws_from_the_same_noise_and_the_float_model_once_more(tiny, tmp_path, monkeypatch):
    held = []
    monkeypatch.setattr(images, "scores", lambda _checkpoint, name, found: held.append((name, found)) or {})
    same = TorchRunner("ort", tiny.load(), tiny.family)
    pytorch = TorchRunner("quantized", tiny.load(), tiny.family)
    rows, _, bad = judge(tiny, ["3", "1"], pytorch, {"ort": same}, tmp_path, 0)
    assert bad == {}
    shown = load_file(tmp_path / images.SHOWN)
    assert torch.equal(shown["float"], shown["ort"])
    assert len(shown["ort"]) == 7
    ((name, found),) = held
    assert name == "ort"
    assert len(found.reference) == len(found.judged) == len(found.again) == 7
    assert torch.equal(found.reference, found.judged)
    assert not torch.isclose(found.reference, found.again).all(dim=(1, 2, 3)).any()
    assert found.asked == [["3", "1"][(SEED_OFFSET + i) % 2] for i in range(7)]
    assert [(row["runner"], row["step"], row["sqnr_db"]) for row in rows] == [
        (runner, step, None) for runner in ("ort", "quantized") for step in range(3)
    ]
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("count", [3, 9])
def test_as_many_images_are_scored_as_are_asked_for(tiny, tmp_path, count):
    net = TorchRunner("quantized", tiny.load(), tiny.family)
    _, found, _ = judge(tiny, ["3"], net, {}, tmp_path, 0, count)
    assert found["n"] == len(found["psnr_db"]["per_image"]) == count


def test_pytorch_is_judged_where_no_engine_runs_and_its_error_is_followed(tiny, tmp_path):
    worse = tiny.load()
    with torch.no_grad():
        worse.proj_out_2.weight *= 1.01
    rows, found, _ = judge(tiny, ["3"], TorchRunner("quantized", worse, tiny.family), {}, tmp_path, 0)
    assert found["runner"] == "quantized"
    assert found["n"] == 7
    assert 0 < found["psnr_db"]["mean"] < 120
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(0 < row["sqnr_db"] < 120 for row in rows)


def test_the_first_call_that_gives_nan_is_kept_with_its_feeds(tiny, tmp_path):
    class Breaking(TorchRunner):
        def run(self, feeds):
            output = super().run(feeds)
            return {name: value * (np.nan if feeds["step"][0] >= 1 else 1) for name, value in output.items()}

    breaking = Breaking("ort", tiny.load(), tiny.family)
    _, found, bad = judge(
        tiny, ["3"], TorchRunner("quantized", tiny.load(), tiny.family), {"ort": breaking}, tmp_path, 0
    )
    assert found["not_finite"] > 0
    assert bad.keys() == {"ort"}
    assert bad["ort"].step == 1
    assert bad["ort"].feeds["step"].tolist() == [1, 1, 1]
