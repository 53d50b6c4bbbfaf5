"""Diffusers pipelines of every family that draw through an engine: the pictures are those of their own denoisers."""

from __future__ import annotations

import json
import math
import shutil
from functools import cache
from types import SimpleNamespace

import diffusers
import drawing
import numpy as np
import pytest
import torch
from PIL import Image
from road import untrained
from safetensors.torch import load_file
from torch import nn

from engines.diffusers import denoiser
from engines.errors import UserError
from exporter import quantized, steps
from exporter.checks import FLOOR_MARGIN_DB
from exporter.quantize import reference_steps
from exporter.run_folder import open_artifacts
from exporter.validate import floor_db

SAME_DB = 60.0  # floats in another order: these measure 120 dB and more, and another prompt's picture 14 to 28
ROUNDED_DB = 50.0  # of a picture in 8 bits, whose rounding alone is 58.9 dB: 10 log10(12 · 255²)


def psnr_db(one, other):
    error = float(np.square(one.astype(np.float64) - other).mean())
    return 10 * math.log10(1 / error) if error else math.inf


@pytest.fixture(scope="module")
def family_of(tmp_path_factory):
    """Returns a family's saved pipeline and the bundle of its denoiser, in float, made when first asked for."""

    @cache
    def get(name):
        folder = drawing.saved_pipeline(name, tmp_path_factory.mktemp(name) / "pipeline")
        return folder, drawing.float_bundle(name, folder, folder.with_name("bundle"))

    return get


@pytest.mark.parametrize("name", drawing.DENOISERS)
def test_a_pipeline_draws_the_same_through_an_engine(name, family_of, tmp_path):
    folder, bundle = family_of(name)
    pipeline = drawing.opened(name, folder)
    wanted, other = drawing.draw(name, pipeline), drawing.draw(name, pipeline, "a red square")
    assert psnr_db(wanted, other) < 40  # the prompt, or the label, matters
    setattr(pipeline, drawing.denoiser_name(name), denoiser(bundle))
    assert psnr_db(wanted, drawing.draw(name, pipeline)) >= SAME_DB

    asked = ["--label", len("a blue circle")] if name == "dit" else ["--prompt", "a blue circle"]
    asked += ["--size", 32] if name == "flux" else []
    drawing.run_example(name, folder, bundle, *asked, "--steps", drawing.STEPS, "--out", tmp_path / "it.png")
    drawn = np.asarray(Image.open(tmp_path / "it.png")) / 255
    assert psnr_db(wanted[0], drawn) >= ROUNDED_DB


def test_a_pipeline_opens_with_an_engine_in_place_of_weights(family_of):
    folder, bundle = family_of("dit")
    pipeline = diffusers.DiTPipeline.from_pretrained(folder, transformer=denoiser(bundle))
    assert psnr_db(drawing.draw("dit", drawing.opened("dit", folder)), drawing.draw("dit", pipeline)) > SAME_DB


@pytest.mark.parametrize("mask", ["none", "words", "scores"])
def test_a_mask_may_be_given_in_every_way_that_the_class_takes(family_of, mask):
    folder, bundle = family_of("pixart")
    words = (torch.arange(6) < torch.tensor([[2], [5]])).float()
    masks = {"none": None, "words": words, "scores": (1 - words)[:, None] * -10_000}
    given = (torch.randn(2, 4, 16, 16), torch.randn(2, 6, 64), torch.tensor([400, 400]))
    rest = {"attention_mask": torch.ones(2, 64), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    assert_same_output(folder, bundle, *given, encoder_attention_mask=masks[mask], **rest)


@pytest.mark.parametrize("by_row", [False, True])
def test_positions_may_come_with_a_batch_axis_or_without(family_of, by_row):
    folder, bundle = family_of("flux")
    image, text = torch.randint(0, 8, (64, 3)).float(), torch.zeros(5, 3)
    ids = {"img_ids": image.repeat(2, 1, 1), "txt_ids": text[None]} if by_row else {"img_ids": image, "txt_ids": text}
    tensors = {"encoder_hidden_states": torch.randn(2, 5, 64), "pooled_projections": torch.randn(2, 64)}
    times = {"timestep": torch.tensor([0.5, 0.25]), "guidance": torch.tensor([3.5])}
    assert_same_output(folder, bundle, torch.randn(2, 64, 64), **tensors, **times, **ids)


def assert_same_output(folder, bundle, *args, **kwargs):
    class_name = json.loads((folder / "transformer" / "config.json").read_text())["_class_name"]
    source = getattr(diffusers, class_name).from_pretrained(folder / "transformer")
    with torch.no_grad():
        wanted = source(*args, **kwargs, return_dict=False)[0]
    found = denoiser(bundle)(*args, **kwargs, return_dict=False)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


class Pixels(nn.Module):
    """Stands where a VAE would: digits-dit draws pixels itself."""

    config = SimpleNamespace(scaling_factor=1.0)
    dtype, device = torch.float32, torch.device("cpu")

    def decode(self, latents):
        return SimpleNamespace(sample=latents)


class Stepped(nn.Module):
    """A quantized PyTorch model that is told the step it is at, as a pipeline's denoiser."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, source):
        super().__init__()
        self.model, self.config = quantized.load(source), quantized.load(source).config
        self._timesteps = [int(t) for t in source.info["timesteps"]]

    def forward(self, hidden_states, timestep, class_labels):
        step = torch.tensor([self._timesteps.index(int(t)) for t in timestep])
        with torch.no_grad(), steps.at(steps.Position(step)):
            return self.model(hidden_states, timestep=timestep, class_labels=class_labels)


def digits_pipeline(checkpoint, model):
    scheduler = diffusers.DDIMScheduler.from_config(checkpoint.scheduler)
    pipeline = diffusers.DiTPipeline(model, Pixels(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def digits(pipeline, count, number):
    noise = torch.Generator().manual_seed(0)
    return pipeline(range(count), 1.0, noise, number, output_type="np").images


def least_db(source):
    """Returns what pictures must agree to: 60 dB, or 3 dB under what rounding alone leaves, where that is lower."""
    reference = load_file(source.file(quantized.REFERENCE))
    floors = [floor_db(reference, step, "fp32") for step in reference_steps(reference)]
    return min(SAME_DB, min(floors) - FLOOR_MARGIN_DB)


def test_digits_are_those_of_pytorch_and_of_the_runtimes_own_loop(
    checkpoint, quantized_of, graph_of, engine_of, tmp_path
):
    parts = {"quantized": quantized_of("int8"), "graph/fp32": graph_of("int8", "fp32")}
    for place, artifact in (parts | {"engines/ort": engine_of("int8", "ort")}).items():
        shutil.copytree(artifact.path, tmp_path / place)
    run, source = open_artifacts(tmp_path), quantized_of("int8")
    through = denoiser(drawing.bundle_of(run, checkpoint, tmp_path, tmp_path / "bundle"))
    number = checkpoint.sampler["steps"]
    drawn = digits(digits_pipeline(checkpoint, through), 10, number)
    wanted = digits(digits_pipeline(checkpoint, quantized.load(source)), 10, number)
    assert psnr_db(wanted, drawn) >= least_db(source)

    noise = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()
    latent = through.engine.sample(noise, {"class_labels": np.arange(10)})
    alone = (latent / 2 + 0.5).clip(0, 1).transpose(0, 2, 3, 1)
    assert psnr_db(alone, drawn) >= least_db(source)


def test_steps_come_from_the_pipelines_schedule_and_another_is_refused(family_of, tmp_path):
    folder, _ = family_of("dit")
    bundle = drawing.bundled(folder / "transformer", tmp_path / "bundle", untrained("dilate-w8a8"))
    source = open_artifacts(tmp_path / "bundle-run").quantized
    assert any(spec.steps for spec in quantized.specs(source).values())
    pipeline = drawing.opened("dit", folder)
    pipeline.transformer = Stepped(source)
    wanted = drawing.draw("dit", pipeline)
    pipeline.transformer = denoiser(bundle)
    assert psnr_db(wanted, drawing.draw("dit", pipeline)) >= least_db(source)
    with pytest.raises(UserError, match=r"timestep .* 2 steps") as caught:
        drawing.draw("dit", pipeline, num_inference_steps=3)
    assert "num_inference_steps=2" in caught.value.fix
    pipeline.transformer = denoiser(bundle, nearest=True)
    assert drawing.draw("dit", pipeline, num_inference_steps=3).shape == wanted.shape
