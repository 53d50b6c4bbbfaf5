"""Small random diffusers pipelines of six families, bundles of their denoisers, and how both are drawn with."""

from __future__ import annotations

import contextlib
import importlib.util
import json

import diffusers
import torch
from common import FAMILIES, ROOT, TINY
from diffusers.utils import logging
from families import clip_encoder, randomize, t5_encoder, tokenizer
from safetensors.torch import save_file

from engines import artifacts
from engines.build import build
from exporter import recipe
from exporter.bundle import bundle
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.images import SHOWN
from exporter.lower import lower
from exporter.quantize import quantize
from exporter.run_folder import REPORT, Run

STEPS = 2
ONE = {"num_layers": 1}
# One block on the way down, one up: text is read in the middle.
SMALL_UNET = {
    "block_out_channels": [32],
    "norm_num_groups": 8,
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "transformer_layers_per_block": 1,
    "attention_head_dim": 4,
}
DENOISERS = {
    "dit": {**TINY, **ONE, "in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 1000},
    "sd": {**FAMILIES["sd"], **SMALL_UNET},
    # 32 of pooled text, and six sizes of 32 each
    "sdxl": {**FAMILIES["sdxl"], **SMALL_UNET, "projection_class_embeddings_input_dim": 224},
    "pixart": {**FAMILIES["pixart-sigma"], **ONE},
    "sd3": {**FAMILIES["sd3"], **ONE},
    "flux": {**FAMILIES["flux-dev"], **ONE},
}
# What each pipeline is called with beside a prompt or labels, as its example does.
ARGUMENTS = {"pixart": {"use_resolution_binning": False}, "flux": {"height": 32, "width": 32}}  # VAEs here halve once


def denoiser_name(name):
    return "unet" if name in ("sd", "sdxl") else "transformer"


def vae(channels):
    halves = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    made = diffusers.AutoencoderKL(
        **halves, block_out_channels=[8, 8], norm_num_groups=4, latent_channels=channels, scaling_factor=1.0,
        shift_factor=0.0, sample_size=32,
    )  # fmt: skip
    return randomize(made, 1)


def _clip(width, *, projected=False):
    return randomize(clip_encoder(width, projected=projected))


def _parts(name):
    """Returns what a pipeline has beside its denoiser."""
    clip, t5 = tokenizer(77, clip=True), tokenizer(77, clip=False)
    if name == "dit":
        return {"vae": vae(4), "scheduler": diffusers.DDIMScheduler()}
    if name == "sd":
        absent = dict.fromkeys(("safety_checker", "feature_extractor"))
        first = {
            "text_encoder": _clip(64),
            "tokenizer": clip,
            "scheduler": diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        }
        return {"vae": vae(4), **first, **absent, "requires_safety_checker": False}
    if name == "sdxl":
        first = {"text_encoder": _clip(32), "tokenizer": clip, "tokenizer_2": clip}
        second = {"text_encoder_2": _clip(32, projected=True), "scheduler": diffusers.EulerDiscreteScheduler()}
        return {"vae": vae(4), **first, **second}
    large = randomize(t5_encoder(64))
    if name == "pixart":
        scheduler = diffusers.DPMSolverMultistepScheduler()
        return {"vae": vae(4), "text_encoder": large, "tokenizer": t5, "scheduler": scheduler}
    parts = {"vae": vae(16), "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(), "tokenizer": clip}
    if name == "sd3":
        encoders = {"text_encoder": _clip(32, projected=True), "text_encoder_2": _clip(32, projected=True)}
        return {**parts, **encoders, "text_encoder_3": large, "tokenizer_2": clip, "tokenizer_3": t5}
    return {**parts, "text_encoder": _clip(64), "text_encoder_2": large, "tokenizer_2": t5}


CLASSES = {
    "dit": "DiTPipeline",
    "sd": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "pixart": "PixArtSigmaPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
}


def saved_pipeline(name, folder):
    """Saves a family's small random pipeline as diffusers does."""
    logging.set_verbosity_error()
    config = dict(DENOISERS[name])
    size = config.pop("sample_size") if name == "flux" else None  # its class has none
    model = randomize(getattr(diffusers, config.pop("_class_name"))(**config))
    pipeline = getattr(diffusers, CLASSES[name])(**{denoiser_name(name): model}, **_parts(name))
    pipeline.save_pretrained(folder, safe_serialization=True)
    if size:
        path = folder / "transformer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": size}))
    return folder


def opened(name, folder):
    pipeline = getattr(diffusers, CLASSES[name]).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(name, pipeline, prompt="a blue circle", **options):
    """Returns a picture [1, height, width, 3] in [0, 1], always of the same noise."""
    asked = {"class_labels": [len(prompt)]} if name == "dit" else {"prompt": prompt}
    options = {"num_inference_steps": STEPS, "output_type": "np", **ARGUMENTS.get(name, {}), **options}
    return pipeline(**asked, generator=torch.Generator().manual_seed(0), **options).images


def bundled(model, out, recipe_, steps=STEPS):
    """Writes a bundle of what was saved in a folder, without judging it: no picture is drawn."""
    checkpoint = open_checkpoint(str(model), steps=steps)
    run = out.with_name(f"{out.name}-run")
    calibration = calibrate(checkpoint, run / "calibration", samples=2)
    source = quantize(checkpoint, recipe_, calibration, run / "quantized")
    graph = lower(source, run / "graph" / "fp32", dtype="fp32")
    engine = build(graph, "ort", run / "engines" / "ort")
    return bundle_of(Run(source, {"fp32": graph}, {"ort": engine}), checkpoint, run, out)


def bundle_of(run, checkpoint, folder, out):
    """Writes the bundle of a run that was not validated, as if it had passed with no check and no picture."""
    images = {"runner": "quantized", "task_score": None, "psnr_db": {"noise_floor": 10.0}}
    report = {"made_from": run.judged, "settings": {"seed": 0}, "checks": [], "passed": True}
    save_file({"quantized": torch.zeros(1, *checkpoint.family.latent_shape())}, folder / SHOWN)
    report["shown"] = artifacts.digest_file(folder / SHOWN)
    artifacts.write_json(folder / REPORT, report | {"accuracy": {"images": images, "lowering": []}})
    return bundle(folder, out).path


def float_bundle(name, pipeline_folder, out):
    return bundled(pipeline_folder / denoiser_name(name), out, recipe.load("fp16"))


def run_example(name, *arguments):
    """Runs the example script of a family in this process."""
    path = ROOT / "docs" / "examples" / f"diffusers_{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(None):
        module.main([str(argument) for argument in arguments])
