"""PixArt's forward without `squeeze(1)` of the tokens, which the exporter writes as a Squeeze that no runtime takes."""

from __future__ import annotations

import torch
from diffusers import PixArtTransformer2DModel

MASKED = -10_000.0  # Source: diffusers, PixArtTransformer2DModel.forward: what is added to the scores of padding


class PixArtTokens(PixArtTransformer2DModel):  # type: ignore[misc]
    """diffusers' model; sizes are inputs of their own."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        resolution: torch.Tensor | None = None,
        aspect_ratio: torch.Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor]:
        """Returns (prediction [batch, channels, height, width],); the mask [batch, text tokens] is 1 at words.

        Source: diffusers, PixArtTransformer2DModel.forward.
        """
        batch, patch = hidden_states.shape[0], self.config.patch_size
        height, width = (side // patch for side in hidden_states.shape[2:])
        bias = MASKED * (1 - encoder_attention_mask.to(hidden_states.dtype))[:, None]
        image, text = self.pos_embed(hidden_states), encoder_hidden_states
        modulation, embedding = self.adaln_single(
            timestep,
            {"resolution": resolution, "aspect_ratio": aspect_ratio},
            batch_size=batch,
            hidden_dtype=image.dtype,
        )
        if self.caption_projection is not None:
            text = self.caption_projection(text)
        for block in self.transformer_blocks:
            image = block(
                image, encoder_hidden_states=text, encoder_attention_mask=bias, timestep=modulation, class_labels=None
            )
        shift, scale = (self.scale_shift_table[None] + embedding[:, None]).chunk(2, dim=1)
        patches = self.proj_out(self.norm_out(image) * (1 + scale) + shift)
        patches = patches.reshape(batch, height, width, patch, patch, self.out_channels)
        sample = patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, self.out_channels, height * patch, width * patch)
        return (sample,)
