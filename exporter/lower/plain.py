"""Lowers a float module as it is, without quantization: text encoders and VAE decoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import nn

from exporter.lower import write
from exporter.lower.passes.attach_tensors import AttachTensors
from exporter.lower.passes.fold_constants import FoldConstants
from exporter.lower.passes.name_after_modules import NameAfterModules
from exporter.lower.passes.share_initializers import ShareInitializers
from exporter.lower.trace import PREFIX, TORCH_TYPES, default_dtype, export, graph_of
from exporter.models import Axis, TensorSpec


class _Call(nn.Module):
    """Puts a module under the name that every traced one has."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found: tuple[torch.Tensor, ...] = self.model(*inputs)
        return found


def lower_plain(
    module: nn.Module,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    axes: Mapping[str, Axis],
    dtype: str,
    path: Path,
) -> None:
    """Writes the graph of `module`, which is turned to `dtype` where it lies: there is one copy of its weights.

    It takes its inputs in order and returns a tuple, both as their specs say; `axes` gives the sizes to trace at.
    """
    module.to(TORCH_TYPES[dtype])
    with default_dtype(TORCH_TYPES[dtype]), torch.no_grad():
        graph = graph_of(export(_Call(module), inputs, axes, dtype))
    passes = ir.passes.Sequential(
        FoldConstants(),
        NameAfterModules(PREFIX, inputs, outputs),
        common.RemoveUnusedNodesPass(),
        AttachTensors({**dict(module.named_parameters()), **dict(module.named_buffers())}),
        ShareInitializers(),
        common.ClearMetadataAndDocStringPass(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write(passes(graph).model, path)
    onnx.checker.check_model(str(path), full_check=True)
