"""Small random text-to-image pipelines, whole: denoiser, text encoder, tokenizer, VAE, scheduler; and their bundle."""

from __future__ import annotations

import json

from common import FAMILIES
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from families import randomize
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from engines import backends
from engines.artifacts import digest_file
from engines.build import build
from exporter import recipe
from exporter.bundle import bundle
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.conditions import Conditions, validation_entries
from exporter.images import SEED_OFFSET, SHOWN
from exporter.lower import lower
from exporter.quantize import quantize
from exporter.run_folder import REPORT, open_run
from exporter.sampling import sample

MERGES = [("r", "e"), ("re", "d</w>"), ("c", "i"), ("ci", "r"), ("cir", "c"), ("circ", "l"), ("circl", "e</w>")]
TOKENS = 20
STEPS = 3
CAPTIONS = ["a red circle", "a blue square " * 5, "Ünïcode ☃"]


def clip_tokenizer(length=TOKENS):
    """Returns a tokenizer of CLIP's kind: every byte, and a few words."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in MERGES)]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=MERGES, model_max_length=length)


def text_encoder(tokenizer, width, *, projected=False):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, projection_dim=width,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return randomize((CLIPTextModelWithProjection if projected else CLIPTextModel)(config))


def vae(**changes):
    """Returns a VAE that halves once."""
    config = {
        "block_out_channels": [32, 64], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 32,
        "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
        "force_upcast": False,
    }  # fmt: skip
    return randomize(AutoencoderKL(**{**config, **changes}))


def save_pipeline(folder, name="sd", **vae_changes):
    """Writes a pipeline as diffusers does, `sd` or `sdxl`; returns its folder."""
    config = {key: value for key, value in FAMILIES[name].items() if not key.startswith("_")}
    words = clip_tokenizer()
    parts = {"text_encoder": text_encoder(words, 64 if name == "sd" else 24), "tokenizer": words}
    if name == "sdxl":
        parts |= {"text_encoder_2": text_encoder(words, 40, projected=True), "tokenizer_2": words}
        config |= {"projection_class_embeddings_input_dim": 40 + 6 * config["addition_time_embed_dim"]}
    parts |= {"unet": randomize(UNet2DConditionModel(**config)), "vae": vae(**vae_changes)}
    parts["scheduler"] = DDIMScheduler(clip_sample=False, steps_offset=1)
    for part, saved in parts.items():
        saved.save_pretrained(folder / part)
    index = {part: [type(one).__module__.split(".")[0], type(one).__name__] for part, one in parts.items()}
    kind = "StableDiffusionPipeline" if name == "sd" else "StableDiffusionXLPipeline"
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind, **index}))
    (folder / "sampler.json").write_text(json.dumps({"steps": STEPS, "guidance_scale": 3.0}))
    return folder


def bundled_pipeline(pipeline, folder):
    """Runs a pipeline unquantized, judged by hand, in a folder; returns its bundle, which lies within."""
    rules = folder / "few.toml"
    rules.write_text('[calibration]\nsamples = 2\n[[rule]]\nlayers = "*"\nkeep = "float"\n')
    checkpoint = open_checkpoint(str(pipeline))
    calibration = calibrate(checkpoint, folder / "calibration", samples=2, prompts=CAPTIONS)
    source = quantize(checkpoint, recipe.load(str(rules)), calibration, folder / "quantized")
    engine = build(lower(source, folder / "graph" / "fp32"), "ort", folder / "engines" / "ort")
    judge(folder, checkpoint, engine)
    return bundle(folder, folder / "bundle").path


def judge(folder, checkpoint, engine):
    """Writes what `validate` would: a report without scores, and the first samples."""
    _, run = open_run(folder)
    indices = [SEED_OFFSET, SEED_OFFSET + 1]
    conditions = Conditions(checkpoint, validation_entries(checkpoint, run.quantized.info["entries"]))
    drawn = sample(backends.open_runner(engine, 1), checkpoint, conditions, indices, 0)
    save_file({"ort": drawn.contiguous()}, folder / SHOWN)
    images = {"runner": "ort", "task_score": None, "psnr_db": {"noise_floor": 10.0}}
    report = {"made_from": run.judged, "passed": True, "checks": [], "settings": {"seed": 0}}
    report["shown"] = digest_file(folder / SHOWN)
    (folder / REPORT).write_text(json.dumps(report | {"accuracy": {"images": images, "lowering": []}}))
