"""Small random text-to-image pipelines, whole: denoiser, text encoder, tokenizer, VAE, scheduler."""

from __future__ import annotations

import json

from common import FAMILIES
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from families import randomize
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

MERGES = [("r", "e"), ("re", "d</w>"), ("c", "i"), ("ci", "r"), ("cir", "c"), ("circ", "l"), ("circl", "e</w>")]
TOKENS = 20
STEPS = 3


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
