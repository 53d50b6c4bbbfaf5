"""The VAE of a pipeline: what turns finished latents into pictures, opened without the half that encodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from engines.artifacts import read_json
from engines.errors import UserError
from exporter.models import Axis, TensorSpec

FOLDER, CLASS = "vae", "AutoencoderKL"
INPUT, OUTPUT = "latent", "picture"


class Decoder(nn.Module):
    """Decodes latents as the VAE was trained on, [n, c, h, w], to pictures in about [−1, 1]."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        vae.encoder = vae.quant_conv = None  # a third of its weights, and nobody encodes
        self.vae = vae

    def forward(self, latent: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.vae.decode(latent, return_dict=False)[0],)

    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(INPUT, "float", ("batch", self.vae.config.latent_channels, "height", "width")),)

    def outputs(self) -> tuple[TensorSpec, ...]:
        """Returns the picture's shape; its sides are the latent's, doubled as often as the VAE halves."""
        return (
            TensorSpec(OUTPUT, "float", ("batch", self.vae.config.out_channels, "picture_height", "picture_width")),
        )

    def axes(self, height: int, width: int) -> dict[str, Axis]:
        """Returns what it is traced with."""
        return {"batch": Axis(1, 2, 2), "height": Axis(1, height, height), "width": Axis(1, width, width)}


def open_decoder(root: Path) -> Decoder:
    """Opens a pipeline's VAE in fp32, from safetensors alone."""
    import diffusers
    from diffusers.utils import logging
    from safetensors import SafetensorError

    folder = root / FOLDER
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder}: holds no safetensors weights",
            fix="save the pipeline with save_pretrained(…, safe_serialization=True); pickles are never read",
        )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        vae, info = diffusers.AutoencoderKL.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, torch_dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: no {CLASS} can be opened ({error})", fix="copy the pipeline again") from error
    if missing := sorted(info["missing_keys"]):  # diffusers would draw them, and go on
        raise UserError(f"{folder}: its weights lack {missing[0]!r}", fix="copy the pipeline again")
    return Decoder(vae.eval().requires_grad_(False))


def why_not(root: Path, index: dict[str, Any], latent: tuple[int, ...]) -> str | None:
    """Returns why a pipeline's VAE is not served, None where it is; `latent` is the denoiser's, [c, h, w]."""
    entry = index.get(FOLDER)
    if not isinstance(entry, list) or entry[:1] == [None]:
        return "its samples are latents, and it has no VAE"
    if entry[1:] != [CLASS]:
        return f"its VAE is of class {entry[-1]!r}; {CLASS} is served"
    config = read_json(root / FOLDER / "config.json")
    if config.get("latents_mean") is not None:
        return "its VAE has a mean for every channel, which is not served"
    if len(latent) != 3 or config.get("latent_channels", 4) != latent[0]:
        return f"its latents are {list(latent)}, and its VAE decodes {config.get('latent_channels', 4)} channels"
    return None
