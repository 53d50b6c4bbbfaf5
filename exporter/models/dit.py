"""diffusers' class-conditional DiT.

Source: Peebles and Xie, arXiv 2212.09748; each block holds an adaLN-Zero modulation with embedders of its own.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from exporter.models import Axis, Family, Fold, Tensors, TensorSpec, batch_axis


class DiT(Family):
    """Labels and timesteps are embedded in every block; the positions' table fixes height and width."""

    CLASS = "DiTTransformer2DModel"

    def inputs(self) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec("hidden_states", "float", ("batch", *self.latent_shape())),
            TensorSpec("timestep", "int64", ("batch",)),
            TensorSpec("class_labels", "int64", ("batch",), largest=int(self.config["num_embeds_ada_norm"])),
        )

    def output(self) -> TensorSpec:
        channels = self.config.get("out_channels") or self.config["in_channels"]
        return TensorSpec("sample", "float", ("batch", channels, *self.latent_shape()[1:]))

    def axes(self) -> dict[str, Axis]:
        return {"batch": batch_axis(self.config["sample_size"] ** 2)}

    def blocks(self, model: nn.Module) -> list[str]:
        return [f"transformer_blocks.{i}" for i in range(len(cast(nn.ModuleList, model.transformer_blocks)))]

    def folds(self, model: nn.Module) -> list[Fold]:
        """Per block: the two adaLN modulations, and V's rows before the attention's output projection."""
        found = []
        for block in self.blocks(model):
            path = f"{block}.norm1.linear"
            width = cast(nn.Linear, model.get_submodule(path)).out_features // 6
            rows = [slice(i * width, (i + 1) * width) for i in range(6)]  # shift, scale, gate: attention, feed-forward
            attention = tuple(f"{block}.attn1.to_{n}" for n in "qkv")
            found.append(Fold(attention, ((path, rows[0], "value"), (path, rows[1], "scale"))))
            found.append(Fold((f"{block}.ff.net.0.proj",), ((path, rows[3], "value"), (path, rows[4], "scale"))))
            found.append(Fold((f"{block}.attn1.to_out.0",), ((attention[2], slice(None), "value"),)))
        return found

    def classes(self) -> int | None:
        return int(self.config["num_embeds_ada_norm"])

    def label(self, labels: torch.Tensor) -> tuple[Tensors, Tensors]:
        return {"class_labels": labels}, {
            "class_labels": torch.full_like(labels, int(self.config["num_embeds_ada_norm"]))
        }

    def feeds(self, latent: torch.Tensor, timestep: torch.Tensor, conditions: Tensors, guidance: float) -> Tensors:
        return {"hidden_states": latent, "timestep": timestep.long(), **conditions}

    def prediction(self, output: torch.Tensor) -> torch.Tensor:
        return output[:, : self.config["in_channels"]]
