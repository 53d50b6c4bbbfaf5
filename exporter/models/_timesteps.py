"""Sinusoidal timestep embeddings whose frequencies are a table, so that a graph holds the very numbers torch has.

Left to the exporter, the frequencies are constant-folded in numpy: 57 of digits-dit's 128 came out one unit in the last
place off, which a timestep of 999 multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from diffusers.models.embeddings import Timesteps
from torch import nn

MAX_PERIOD = 10_000  # Source: diffusers, get_timestep_embedding


class TimestepTable(nn.Module):
    """Computes what diffusers' `Timesteps` does, bit for bit: [batch] → [batch, channels], fp32."""

    frequencies: torch.Tensor

    def __init__(self, source: Timesteps) -> None:
        super().__init__()
        self.sines_last, self.factor = source.flip_sin_to_cos, source.scale
        half = source.num_channels // 2
        exponent = -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32)
        frequencies = torch.exp(exponent / (half - source.downscale_freq_shift))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        angles = self.factor * (timesteps[:, None].float() * self.frequencies[None, :])
        parts = [torch.sin(angles), torch.cos(angles)]
        return torch.cat(parts[::-1] if self.sines_last else parts, dim=-1)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TimestepTable:
        device = fn(self.frequencies).device
        self.frequencies = self.frequencies.to(device)  # angles are fp32 in diffusers, whatever the model is in
        return self


def use_tables(model: nn.Module) -> nn.Module:
    """Replaces every `Timesteps` of a model."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Timesteps):
            owner, _, leaf = path.rpartition(".")
            model.get_submodule(owner)._modules[leaf] = TimestepTable(module)
    return model
