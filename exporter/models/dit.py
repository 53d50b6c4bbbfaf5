"""diffusers' class-conditional DiT.

Source: Peebles and Xie, arXiv 2212.09748; each block holds an adaLN-Zero modulation with embedders of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn

from exporter.models import Config, Fold, InputSpec

CLASS = "DiTTransformer2DModel"
OUTPUT = "sample"


def build(config: Config) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    from exporter.models._timesteps import use_tables

    return use_tables(DiTTransformer2DModel.from_config(dict(config)))


def inputs(config: Config) -> tuple[InputSpec, ...]:
    return (
        InputSpec("hidden_states", "float", ("batch", *latent_shape(config))),
        InputSpec("timestep", "int64", ("batch",)),
        InputSpec("class_labels", "int64", ("batch",)),
    )


def blocks(model: nn.Module) -> list[str]:
    return [f"transformer_blocks.{i}" for i in range(len(cast(nn.ModuleList, model.transformer_blocks)))]


def folds(model: nn.Module) -> list[Fold]:
    """Per block: the two adaLN modulations, and V's rows before the attention's output projection."""
    found = []
    for block in blocks(model):
        modulation = cast(nn.Linear, model.get_submodule(f"{block}.norm1.linear"))
        width = modulation.out_features // 6  # shift, scale, gate of the attention, then of the feed-forward
        rows = [slice(i * width, (i + 1) * width) for i in range(6)]
        attention = tuple(f"{block}.attn1.to_{n}" for n in "qkv")
        path = f"{block}.norm1.linear"
        found.append(Fold(attention, ((path, rows[0], "shift"), (path, rows[1], "scale"))))
        found.append(Fold((f"{block}.ff.net.0.proj",), ((path, rows[3], "shift"), (path, rows[4], "scale"))))
        if cast(nn.Linear, model.get_submodule(attention[2])).bias is not None:
            found.append(Fold((f"{block}.attn1.to_out.0",), ((attention[2], slice(None), "value"),)))
    return found


def latent_shape(config: Config) -> tuple[int, ...]:
    return (config["in_channels"], config["sample_size"], config["sample_size"])


def conditions(config: Config, indices: Sequence[int], *, null: bool = False) -> dict[str, torch.Tensor]:
    classes = int(config["num_embeds_ada_norm"])
    labels = torch.tensor([classes if null else i % classes for i in indices])
    return {"class_labels": labels}


def feeds(
    latent: torch.Tensor, timestep: torch.Tensor, conditions: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    return {"hidden_states": latent, "timestep": timestep.long(), **conditions}


def prediction(config: Config, output: torch.Tensor) -> torch.Tensor:
    return output[:, : config["in_channels"]]


def call(model: nn.Module, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return cast(torch.Tensor, model(**feeds, return_dict=False)[0])


def labels(config: Config, indices: Sequence[int]) -> torch.Tensor | None:
    return conditions(config, indices)["class_labels"]
