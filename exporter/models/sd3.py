"""diffusers' MMDiT: Stable Diffusion 3 and 3.5.

Source: Esser et al., arXiv 2403.03206; image and text are two streams of tokens that attend jointly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from engines.errors import UserError
from exporter.models import Axis, Family, Fold, Tensors, TensorSpec, batch_axis, size_axis
from exporter.models._joint import final_fold, joint_folds

CLIP_TOKENS, T5_TOKENS = 77, 256  # Source: diffusers, StableDiffusion3Pipeline: CLIP's text, then T5's
T5_MOST = 512  # Source: diffusers, StableDiffusion3Pipeline.check_inputs


class SD3(Family):
    """The position table is cropped around its centre, so height and width are dynamic up to its size."""

    CLASS = "SD3Transformer2DModel"
    SCHEDULER = "FlowMatchEulerDiscreteScheduler"

    def build(self) -> nn.Module:
        side, table = self.config["sample_size"] // self.config["patch_size"], self.config["pos_embed_max_size"]
        if not table or side > table:
            raise UserError(
                f"{self.CLASS} with sample_size = {self.config['sample_size']} has {side} × {side} patches, but its "
                f"table of positions (pos_embed_max_size) holds {table or 'none'}",
                fix="copy the model's config.json again",
            )
        return super().build()

    def inputs(self) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec("hidden_states", "float", ("batch", self.config["in_channels"], "height", "width")),
            TensorSpec("timestep", "fp32", ("batch",)),
            TensorSpec("encoder_hidden_states", "float", ("batch", "text_tokens", self.config["joint_attention_dim"])),
            TensorSpec("pooled_projections", "float", ("batch", self.config["pooled_projection_dim"])),
        )

    def output(self) -> TensorSpec:
        channels = self.config["out_channels"] or self.config["in_channels"]
        return TensorSpec("sample", "float", ("batch", channels, "height", "width"))

    def axes(self) -> dict[str, Axis]:
        size, patch = self.config["sample_size"], self.config["patch_size"]
        side = size_axis(size, patch)
        side = replace(side, max=min(side.max, self.config["pos_embed_max_size"] * patch))
        text = Axis(1, CLIP_TOKENS + T5_TOKENS, CLIP_TOKENS + T5_MOST)
        return {"batch": batch_axis(size**2), "height": side, "width": side, "text_tokens": text}

    def blocks(self, model: nn.Module) -> list[str]:
        return [f"transformer_blocks.{i}" for i in range(len(cast(nn.ModuleList, model.transformer_blocks)))]

    def folds(self, model: nn.Module) -> list[Fold]:
        """Per block: every adaLN modulation, and V's rows; and the last modulation before proj_out."""
        return [fold for block in self.blocks(model) for fold in joint_folds(model, block)] + [final_fold(model)]

    def text_pipeline(self) -> str | None:
        return "StableDiffusion3Pipeline"

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> tuple[Tensors, Tensors]:
        if pipeline.text_encoder_3 is None:
            # Without T5, which many leave out, the pipeline puts zeros in its place, as wide as the denoiser says.
            config = SimpleNamespace(joint_attention_dim=self.config["joint_attention_dim"])
            object.__setattr__(pipeline, "transformer", SimpleNamespace(config=config))
        text, no_text, pooled, no_pooled = pipeline.encode_prompt(
            list(prompts), None, None, device="cpu", do_classifier_free_guidance=True, max_sequence_length=T5_TOKENS
        )
        return (
            {"encoder_hidden_states": text, "pooled_projections": pooled},
            {"encoder_hidden_states": no_text, "pooled_projections": no_pooled},
        )

    def feeds(self, latent: torch.Tensor, timestep: torch.Tensor, conditions: Tensors, guidance: float) -> Tensors:
        return {"hidden_states": latent, "timestep": timestep.float(), **conditions}
