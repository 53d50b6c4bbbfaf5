"""diffusers' unconditional or class-conditional U-Net.

Source: Ho et al., arXiv 2006.11239; Dhariwal and Nichol, arXiv 2105.05233, for class labels.
"""

from __future__ import annotations

import torch
from torch import nn

from engines.errors import UserError
from exporter.models import Tensors, TensorSpec
from exporter.models._unet import UNet


class UNet2D(UNet):
    """Draws without condition, or for a class label that is added to the timestep's embedding."""

    CLASS = "UNet2DModel"

    def build(self) -> nn.Module:
        for key, served in (("class_embed_type", (None,)), ("time_embedding_type", ("positional",))):
            if self.config[key] not in served:
                raise UserError(
                    f"{self.CLASS} with {key} = {self.config[key]!r} takes inputs that are not served",
                    fix="served are labels that are looked up (num_class_embeds), and sinusoidal timesteps",
                )
        return super().build()

    def condition_inputs(self) -> tuple[TensorSpec, ...]:
        count = self.classes()
        return (TensorSpec("class_labels", "int64", ("batch",), largest=count - 1),) if count else ()

    def classes(self) -> int | None:
        count = self.config["num_class_embeds"]
        return None if count is None else int(count)

    def label(self, labels: torch.Tensor) -> tuple[Tensors, Tensors]:
        # The class keeps no embedding for "no class": guidance would need one, so there is none.
        return {"class_labels": labels}, {}

    def guided(self) -> bool:
        return False
