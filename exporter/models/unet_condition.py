"""diffusers' text-conditional U-Net: Stable Diffusion 1 and 2, and SDXL with its pooled text and sizes.

Source: Rombach et al., arXiv 2112.10752; Podell et al., arXiv 2307.01952, section 2.2 (sizes and crops as conditions).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from engines.errors import UserError
from exporter.models import Axis, Tensors, TensorSpec
from exporter.models._unet import UNet

CLIP_TOKENS = 77  # Source: CLIP's context length, which Stable Diffusion's pipelines pad to
VAE_FACTOR = 8  # Source: Stable Diffusion's and SDXL's VAE halve three times
# What the class can be configured to take beside text, and this family does not feed.
UNSERVED = ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type", "time_cond_proj_dim")


class UNetCondition(UNet):
    """Reads text through cross-attention; SDXL also adds pooled text, and six sizes, to the timestep's embedding."""

    CLASS = "UNet2DConditionModel"

    def build(self) -> nn.Module:
        for key in UNSERVED:
            if self.config.get(key) is not None:
                raise UserError(
                    f"{self.CLASS} with {key} = {self.config[key]!r} takes inputs that are not served",
                    fix="served are Stable Diffusion 1 and 2 and SDXL; write a family for it in exporter/models",
                )
        if self.config["addition_embed_type"] not in (None, "text_time"):
            raise UserError(
                f"{self.CLASS} with addition_embed_type = {self.config['addition_embed_type']!r} is not served",
                fix='served are none, and SDXL\'s "text_time"',
            )
        return super().build()

    @property
    def _is_xl(self) -> bool:
        return bool(self.config["addition_embed_type"] == "text_time")

    @property
    def _pooled(self) -> int:
        return int(self.config["projection_class_embeddings_input_dim"] - 6 * self.config["addition_time_embed_dim"])

    def axes(self) -> dict[str, Axis]:
        # Long captions come in chunks of CLIP's length.
        return super().axes() | {"text_tokens": Axis(1, CLIP_TOKENS, 3 * CLIP_TOKENS)}

    def condition_inputs(self) -> tuple[TensorSpec, ...]:
        width = self.config["cross_attention_dim"]
        width = width if isinstance(width, int) else width[0]
        text = TensorSpec("encoder_hidden_states", "float", ("batch", "text_tokens", width))
        if not self._is_xl:
            return (text,)
        pooled = TensorSpec("text_embeds", "float", ("batch", self._pooled))
        return text, pooled, TensorSpec("time_ids", "fp32", ("batch", 6))

    def text_pipeline(self) -> str | None:
        return "StableDiffusionXLPipeline" if self._is_xl else "StableDiffusionPipeline"

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> tuple[Tensors, Tensors]:
        guided = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
        if not self._is_xl:
            text, no_text = pipeline.encode_prompt(list(prompts), **guided)
            return {"encoder_hidden_states": text}, {"encoder_hidden_states": no_text}
        text, no_text, pooled, no_pooled = pipeline.encode_prompt(list(prompts), **guided)
        return (
            {"encoder_hidden_states": text, "text_embeds": pooled},
            {"encoder_hidden_states": no_text, "text_embeds": no_pooled},
        )

    def constants(self, count: int) -> Tensors:
        """SDXL's sizes: the picture's own, uncropped."""
        if not self._is_xl:
            return {}
        height, width = (VAE_FACTOR * side for side in self.latent_shape()[1:])
        return {"time_ids": torch.tensor([[height, width, 0, 0, height, width]] * count, dtype=torch.float32)}

    def call(self, model: nn.Module, feeds: Mapping[str, Any]) -> torch.Tensor:
        added = {name: feeds[name] for name in ("text_embeds", "time_ids") if name in feeds}
        if added:  # concatenated with the sizes' fp32 embedding: the ONNX exporter does not widen what torch does
            pooled = added["text_embeds"]
            added["text_embeds"] = pooled.to(torch.promote_types(pooled.dtype, torch.float32))
        plain: dict[str, Any] = {name: value for name, value in feeds.items() if name not in added}
        return super().call(model, plain | ({"added_cond_kwargs": added} if added else {}))
