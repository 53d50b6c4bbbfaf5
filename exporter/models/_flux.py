"""FLUX as diffusers computes it in fp32, without its fp64 angles and without timesteps rounded to the model's type."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

THETA = 10_000  # Source: diffusers, FluxTransformer2DModel.__init__
PER_UNIT = 1000  # timesteps and guidance come in thousandths of what the embeddings read


class RotaryTable(nn.Module):
    """Gives cosines and sines [tokens, head dim] of positions [tokens, axes]: frequencies in fp64, angles in fp32.

    Source: Su et al., arXiv 2104.09864, equation 15: θ_i = theta^(−2i/d), with d dimensions to an axis.
    """

    frequencies: torch.Tensor

    def __init__(self, axes: Sequence[int]) -> None:
        super().__init__()
        self._halves = [size // 2 for size in axes]
        each = [1.0 / THETA ** (torch.arange(0, d, 2, dtype=torch.float64) / d) for d in axes]
        self.register_buffer("frequencies", torch.cat(each).to(torch.float32), persistent=False)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        each = torch.split(self.frequencies, self._halves)
        angles = torch.cat([ids[:, i, None].float() * each[i] for i in range(len(each))], dim=-1)
        cos, sin = (torch.stack([part, part], dim=-1).flatten(1) for part in (torch.cos(angles), torch.sin(angles)))
        return cos, sin

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RotaryTable:
        device = fn(self.frequencies).device
        self.frequencies = self.frequencies.to(
            device
        )  # angles are fp32 or wider in diffusers, whatever the model is in
        return self


class FluxFp32Times(FluxTransformer2DModel):  # type: ignore[misc]
    """diffusers' model, whose forward scales the timestep in fp32: in fp16, 0.9677 · 1000 is half a step off."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        img_ids: torch.Tensor,
        txt_ids: torch.Tensor,
        guidance: torch.Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor]:
        """Returns (prediction [batch, image tokens, channels],); `img_ids` and `txt_ids` are [tokens, axes].

        Source: diffusers, FluxTransformer2DModel.forward, without adapters and control nets.
        """
        times = [PER_UNIT * value.float() for value in (timestep, guidance) if value is not None]
        embedding = self.time_text_embed(*times, pooled_projections)
        image, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        rotary = self.pos_embed(torch.cat([txt_ids, img_ids]))
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            text, image = block(
                hidden_states=image, encoder_hidden_states=text, temb=embedding, image_rotary_emb=rotary
            )
        return (self.proj_out(self.norm_out(image, embedding)),)
