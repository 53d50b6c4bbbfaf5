"""What diffusers' U-Nets share: blocks, skip concatenations, sizes that halve on the way down."""

from __future__ import annotations

import re
import sys
from abc import abstractmethod
from typing import cast

import torch
from torch import nn

from engines.errors import UserError
from exporter.models import Axis, Family, Fold, Tensors, TensorSpec, batch_axis, size_axis

_BLOCK = re.compile(
    r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)"
)


class UNet(Family):
    """Down blocks, a middle and up blocks of residual convolutions, attention between them."""

    def build(self) -> nn.Module:
        given, made = self.config["in_channels"], self.config["out_channels"]
        if made not in (given, 2 * given):  # twice: a variance that was learned, which schedulers split off
            raise UserError(
                f"{self.CLASS} with {given} channels in and {made} out reads a picture beside the latent, which is not "
                "served",
                fix="served are models that read the latent alone: no inpainting, no edits, no depth",
            )
        return super().build()

    def inputs(self) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec("sample", "float", ("batch", self.config["in_channels"], "height", "width")),
            TensorSpec("timestep", "fp32", ("batch",)),  # some schedulers give fractions
            *self.condition_inputs(),
        )

    @abstractmethod
    def condition_inputs(self) -> tuple[TensorSpec, ...]: ...

    def output(self) -> TensorSpec:
        return TensorSpec("out_sample", "float", ("batch", self.config["out_channels"], "height", "width"))

    def axes(self) -> dict[str, Axis]:
        height, width = self.size()
        multiple = 2 ** (len(self.config["block_out_channels"]) - 1)
        return {
            "batch": batch_axis(height * width),
            "height": size_axis(height, multiple),
            "width": size_axis(width, multiple),
        }

    def blocks(self, model: nn.Module) -> list[str]:
        """The parts that read one tensor: residual blocks, attentions, samplers."""
        return sorted((path for path, _ in model.named_modules() if _BLOCK.fullmatch(path)), key=_run_order)

    def folds(self, model: nn.Module) -> list[Fold]:
        """Per transformer block: its norms' affines, V's rows, and the value half of GEGLU; proj_in's group norm."""
        found = []
        modules = dict(model.named_modules())
        everything = slice(None)
        for path, module in modules.items():
            if type(module).__name__ == "BasicTransformerBlock":
                for norm, readers in _readers(path, modules):
                    if getattr(modules[norm], "weight", None) is not None:
                        found.append(Fold(readers, ((norm, everything, "affine"),)))
                for attention in ("attn1", "attn2"):
                    if f"{path}.{attention}.to_v" in modules:
                        value = (f"{path}.{attention}.to_v", everything, "value")
                        found.append(Fold((f"{path}.{attention}.to_out.0",), (value,)))
                gate = modules.get(f"{path}.ff.net.0")
                if type(gate).__name__ == "GEGLU":
                    half = cast(nn.Linear, modules[f"{path}.ff.net.0.proj"]).out_features // 2
                    found.append(Fold((f"{path}.ff.net.2",), ((f"{path}.ff.net.0.proj", slice(0, half), "value"),)))
            elif type(module).__name__ == "Transformer2DModel" and f"{path}.proj_in" in modules:
                found.append(Fold((f"{path}.proj_in",), ((f"{path}.norm", everything, "affine"),)))
        return found

    def skips(self, model: nn.Module) -> dict[str, int]:
        """The shortcut convolutions of the up blocks; the first part of what they read comes from below."""
        found = {}
        below = (
            _channels(cast(nn.ModuleList, model.get_submodule("mid_block.resnets"))[-1])
            if model.mid_block is not None
            else None
        )
        for index, block in enumerate(cast(nn.ModuleList, model.up_blocks)):
            for number, resnet in enumerate(cast(nn.ModuleList, block.resnets)):
                if below is not None and isinstance(resnet.conv_shortcut, nn.Conv2d):
                    found[f"up_blocks.{index}.resnets.{number}.conv_shortcut"] = below
                below = _channels(resnet)
        return found

    def feeds(self, latent: torch.Tensor, timestep: torch.Tensor, conditions: Tensors, guidance: float) -> Tensors:
        return {"sample": latent, "timestep": timestep.float(), **conditions}


def _readers(block: str, modules: dict[str, nn.Module]) -> list[tuple[str, tuple[str, ...]]]:
    """Returns each norm of a transformer block and the layers that read it."""
    reads_text = bool(getattr(modules[block], "only_cross_attention", False))  # in the first attention too
    found = [
        (f"{block}.norm1", tuple(f"{block}.attn1.to_{n}" for n in ("q" if reads_text else "qkv"))),
        (f"{block}.norm3", (f"{block}.ff.net.0.proj",)),
    ]
    if f"{block}.attn2.to_q" in modules:
        found.append((f"{block}.norm2", (f"{block}.attn2.to_q",)))
    return [(norm, readers) for norm, readers in found if norm in modules and all(r in modules for r in readers)]


def _run_order(path: str) -> tuple[int, int, int, int]:
    part, index, kind, number = cast(re.Match[str], _BLOCK.fullmatch(path)).groups()
    last = kind in ("downsamplers", "upsamplers")
    order = ("down_blocks", "mid_block", "up_blocks").index(part)
    return order, int(index or 0), sys.maxsize if last else int(number), int(kind == "attentions")


def _channels(resnet: nn.Module) -> int:
    return cast(nn.Conv2d, resnet.conv2).out_channels
