"""diffusers' FLUX.1: dev, whose guidance is distilled into an input, and schnell, which has none.

Source: Black Forest Labs, github.com/black-forest-labs/flux; joint blocks, then blocks on one sequence of all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from engines.errors import UserError
from exporter.models import Axis, Family, Fold, Tensors, TensorSpec, batch_axis
from exporter.models._joint import final_fold, joint_folds, modulated

# Side of a latent before 2 × 2 of its positions are packed into a token. The class has no sample_size: this is its
# pipeline's default, for 1024 × 1024 pixels; "sample_size" in a config.json says another.
SAMPLE_SIZE = 128
PACK = 2
DEV_TOKENS, SCHNELL_TOKENS = 512, 256  # Source: diffusers, FluxPipeline; FLUX.1-schnell's model card
TIMESTEPS = 1000  # Source: diffusers, FluxPipeline: the model takes t / 1000
AXES = 3  # of a position: always 0, row, column


class Flux(Family):
    """Sees a latent as a sequence of packed tokens, whose positions are inputs."""

    CLASS = "FluxTransformer2DModel"
    SCHEDULER = "FlowMatchEulerDiscreteScheduler"

    def build(self) -> nn.Module:
        from exporter.models._flux import FluxFp32Times, RotaryTable
        from exporter.models._timesteps import use_tables

        if self.config["out_channels"] not in (None, self.config["in_channels"]):
            raise UserError(
                f"{self.CLASS} with {self.config['in_channels']} channels in and {self.config['out_channels']} out "
                "reads a picture beside the latent, which is not served",
                fix="served are FLUX.1-dev and FLUX.1-schnell, and what is fine-tuned from them",
            )
        config = {name: value for name, value in self.config.items() if name != "sample_size"}
        model = use_tables(FluxFp32Times.from_config(config))
        model._modules["pos_embed"] = RotaryTable(self.config["axes_dims_rope"])
        return model

    @property
    def _side(self) -> int:
        """Tokens along a side of a picture."""
        return int(self.config.get("sample_size") or SAMPLE_SIZE) // PACK

    @property
    def _text_tokens(self) -> int:
        return DEV_TOKENS if self.config["guidance_embeds"] else SCHNELL_TOKENS

    def inputs(self) -> tuple[TensorSpec, ...]:
        guidance = (TensorSpec("guidance", "fp32", ("batch",)),)
        return (
            TensorSpec("hidden_states", "float", ("batch", "image_tokens", self.config["in_channels"])),
            TensorSpec("timestep", "fp32", ("batch",)),
            TensorSpec("encoder_hidden_states", "float", ("batch", "text_tokens", self.config["joint_attention_dim"])),
            TensorSpec("pooled_projections", "float", ("batch", self.config["pooled_projection_dim"])),
            TensorSpec("img_ids", "fp32", ("batch", "image_tokens", AXES)),
            TensorSpec("txt_ids", "fp32", ("batch", "text_tokens", AXES)),
            *(guidance if self.config["guidance_embeds"] else ()),
        )

    def output(self) -> TensorSpec:
        return TensorSpec("sample", "float", ("batch", "image_tokens", self._out_channels))

    @property
    def _out_channels(self) -> int:
        return int(self.config["patch_size"] ** 2 * (self.config["out_channels"] or self.config["in_channels"]))

    def axes(self) -> dict[str, Axis]:
        """Pictures of half to twice the side; captions up to what dev reads."""
        tokens = self._side**2
        return {
            "batch": batch_axis(PACK**2 * tokens),
            "image_tokens": Axis(max(1, tokens // 4), tokens, 4 * tokens),
            "text_tokens": Axis(1, self._text_tokens, DEV_TOKENS),
        }

    def latent_shape(self) -> tuple[int, ...]:
        return (self._side**2, self.config["in_channels"])

    def tokens(self) -> int:
        return self._side**2

    def laid_out(self, samples: torch.Tensor) -> torch.Tensor:
        """Source: diffusers, FluxPipeline._unpack_latents."""
        side = self._side
        packed = samples.reshape(len(samples), side, side, -1, PACK, PACK)
        return packed.permute(0, 3, 1, 4, 2, 5).reshape(len(samples), -1, PACK * side, PACK * side)

    def blocks(self, model: nn.Module) -> list[str]:
        """The joint blocks, then the single ones."""
        names = ("transformer_blocks", "single_transformer_blocks")
        return [f"{name}.{i}" for name in names for i in range(len(cast(nn.ModuleList, getattr(model, name))))]

    def folds(self, model: nn.Module) -> list[Fold]:
        """Per block: every adaLN modulation, and a joint block's V rows; and the last modulation before proj_out.

        A single block's proj_out reads attention beside GELU, which no factor passes through.
        """
        found = []
        for block in self.blocks(model):
            if block.startswith("transformer_blocks"):
                found += joint_folds(model, block)
            else:
                readers = (*(f"{block}.attn.to_{n}" for n in "qkv"), f"{block}.proj_mlp")
                width = cast(nn.Linear, model.get_submodule(readers[0])).in_features
                found.append(modulated(f"{block}.norm.linear", width, 0, 1, readers))
        return [*found, final_fold(model)]

    def text_pipeline(self) -> str | None:
        return "FluxPipeline"

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> tuple[Tensors, Tensors]:
        """Returns CLIP's pooled text and T5's tokens; nothing for no caption, which the network never runs on."""
        text, pooled, _ = pipeline.encode_prompt(list(prompts), device="cpu", max_sequence_length=self._text_tokens)
        return {"encoder_hidden_states": text, "pooled_projections": pooled}, {}

    def constants(self, count: int) -> Tensors:
        """Positions: (0, row, column) of the image's tokens, zeros of the text's."""
        side = torch.arange(self._side, dtype=torch.float32)
        rows, columns = torch.meshgrid(side, side, indexing="ij")
        image = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
        text = torch.zeros(self._text_tokens, AXES)
        return {"img_ids": image.repeat(count, 1, 1), "txt_ids": text.repeat(count, 1, 1)}

    def sigmas(self, steps: int) -> list[float] | None:
        """Source: diffusers, FluxPipeline."""
        return [1.0 - i * (1.0 - 1.0 / steps) / max(steps - 1, 1) for i in range(steps)]

    def guided(self) -> bool:
        return False  # dev reads the guidance scale as an input; schnell has no guidance

    def feeds(self, latent: torch.Tensor, timestep: torch.Tensor, conditions: Tensors, guidance: float) -> Tensors:
        feeds = {"hidden_states": latent, "timestep": timestep.float() / TIMESTEPS, **conditions}
        if self.config["guidance_embeds"]:
            feeds["guidance"] = torch.full((len(latent),), guidance, dtype=torch.float32)
        return feeds

    def call(self, model: nn.Module, feeds: Mapping[str, Any]) -> torch.Tensor:
        """Positions are the same in every row, and the model takes one."""
        return super().call(model, {**feeds, "img_ids": feeds["img_ids"][0], "txt_ids": feeds["txt_ids"][0]})
