"""diffusers' PixArt-α and PixArt-Σ.

Source: Chen et al., arXiv 2310.00426 and 2403.04692; a DiT that reads text through cross-attention (adaLN-single).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from exporter.models import Axis, Family, Fold, Tensors, TensorSpec, batch_axis

ALPHA_TOKENS, SIGMA_TOKENS = 120, 300  # Source: diffusers, encode_prompt of PixArtAlphaPipeline, PixArtSigmaPipeline
VAE_FACTOR = 8  # Source: Stable Diffusion's and SDXL's VAE halve three times


class PixArt(Family):
    """Large α models are also given the picture's resolution and aspect ratio.

    Height and width are fixed: at any other size diffusers computes a new position table in fp64 instead of
    reading the stored one, and the graph holds the table.
    """

    CLASS = "PixArtTransformer2DModel"

    def build(self) -> nn.Module:
        from exporter.models._pixart import PixArtTokens
        from exporter.models._timesteps import use_tables

        return use_tables(PixArtTokens.from_config(dict(self.config)))

    @property
    def _reads_sizes(self) -> bool:
        given = self.config["use_additional_conditions"]
        return bool(self.config["sample_size"] == 128 if given is None else given)  # diffusers' own rule

    @property
    def _is_alpha(self) -> bool:
        # The two differ in nothing else: Σ states its interpolation scale, and never reads sizes.
        return self._reads_sizes or self.config["interpolation_scale"] is None

    @property
    def _text_tokens(self) -> int:
        return ALPHA_TOKENS if self._is_alpha else SIGMA_TOKENS

    def inputs(self) -> tuple[TensorSpec, ...]:
        width = self.config["caption_channels"] or self.config["cross_attention_dim"]
        sizes = (TensorSpec("resolution", "fp32", ("batch", 2)), TensorSpec("aspect_ratio", "fp32", ("batch", 1)))
        return (
            TensorSpec("hidden_states", "float", ("batch", *self.latent_shape())),
            TensorSpec("timestep", "fp32", ("batch",)),  # some schedulers give fractions
            TensorSpec("encoder_hidden_states", "float", ("batch", "text_tokens", width)),
            TensorSpec("encoder_attention_mask", "float", ("batch", "text_tokens")),
            *(sizes if self._reads_sizes else ()),
        )

    def output(self) -> TensorSpec:
        channels = self.config["out_channels"] or self.config["in_channels"]
        return TensorSpec("sample", "float", ("batch", channels, *self.latent_shape()[1:]))

    def axes(self) -> dict[str, Axis]:
        text = Axis(1, self._text_tokens, SIGMA_TOKENS)
        return {"batch": batch_axis(self.config["sample_size"] ** 2), "text_tokens": text}

    def blocks(self, model: nn.Module) -> list[str]:
        return [f"transformer_blocks.{i}" for i in range(len(cast(nn.ModuleList, model.transformer_blocks)))]

    def folds(self, model: nn.Module) -> list[Fold]:
        """Per block: both attentions' V rows; and the caption's projection, which every block's K and V read.

        The modulations fold nowhere: the linear that gives them is one for all blocks, so dividing its rows for one
        block would divide them for every other.
        """
        everything = slice(None)
        found = []
        for block in self.blocks(model):
            for attention in (f"{block}.attn1", f"{block}.attn2"):
                found.append(Fold((f"{attention}.to_out.0",), ((f"{attention}.to_v", everything, "value"),)))
        if model.caption_projection is not None:
            readers = tuple(f"{block}.attn2.to_{n}" for block in self.blocks(model) for n in "kv")
            found.append(Fold(readers, (("caption_projection.linear_2", everything, "value"),)))
        return found

    def text_pipeline(self) -> str | None:
        return "PixArtAlphaPipeline" if self._is_alpha else "PixArtSigmaPipeline"

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> tuple[Tensors, Tensors]:
        text, mask, no_text, no_mask = pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=True, device="cpu", max_sequence_length=self._text_tokens
        )
        return (
            {"encoder_hidden_states": text, "encoder_attention_mask": mask.float()},
            {"encoder_hidden_states": no_text, "encoder_attention_mask": no_mask.float()},
        )

    def constants(self, count: int) -> Tensors:
        """The picture's height and width in pixels, and their ratio."""
        if not self._reads_sizes:
            return {}
        height, width = (VAE_FACTOR * side for side in self.latent_shape()[1:])
        return {
            "resolution": torch.tensor([[height, width]] * count, dtype=torch.float32),
            "aspect_ratio": torch.tensor([[height / width]] * count, dtype=torch.float32),
        }

    def feeds(self, latent: torch.Tensor, timestep: torch.Tensor, conditions: Tensors, guidance: float) -> Tensors:
        return {"hidden_states": latent, "timestep": timestep.float(), **conditions}

    def prediction(self, output: torch.Tensor) -> torch.Tensor:
        return output[:, : self.config["in_channels"]]
