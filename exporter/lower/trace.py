"""Traces a quantized model to ONNX under fake tensors: every initializer gets a name, and no weight is in memory."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engines.artifacts import Artifact
from exporter import quantized
from exporter.lower.passes import quiet
from exporter.models import Family, InputSpec
from exporter.modules import QuantizedLayer, float_layer, replace

OPSET, IR_VERSION = 21, 10  # the oldest pair that carries FP8 and INT4: the most runtimes read it
PREFIX = "model."  # of every name, from the wrapper below; the passes take it off
TORCH_TYPES = {"fp32": torch.float32, "fp16": torch.float16}
# Batch sizes an engine is built for. A choice: 64 serves a calibration batch, 8 a typical request with guidance.
AXES = {"batch": {"min": 1, "opt": 8, "max": 64}}


class _Call(nn.Module):
    """Calls the denoiser as its family does, with the inputs in order."""

    def __init__(self, model: nn.Module, family: Family, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self._family, self._names = model, family, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self._family.call(self.model, dict(zip(self._names, inputs, strict=True)))


def trace(artifact: Artifact, dtype: str) -> ir.Model:
    """Returns the graph in `dtype`; its weights have names, types and shapes but no values yet."""
    family = quantized.family(artifact)
    config = artifact.info["model"]["config"]
    specs = family.inputs(config)
    with _default_dtype(TORCH_TYPES[dtype]), FakeTensorMode(allow_non_fake_inputs=True):
        model = family.build(config).eval()
        for path, spec in quantized.specs(artifact).items():
            replace(model, path, QuantizedLayer(float_layer(model, path), spec))
        inputs = tuple(_example(spec, TORCH_TYPES[dtype]) for spec in specs)
        axes = {name: torch.export.Dim(name, min=a["min"], max=a["max"]) for name, a in AXES.items()}
        shapes = tuple({d: axes[n] for d, n in enumerate(s.shape) if isinstance(n, str)} for s in specs)
        call = _Call(model, family, [spec.name for spec in specs])
        program = torch.export.export(call, inputs, dynamic_shapes={"inputs": shapes}, strict=False)
    with quiet("torch.onnx._internal.exporter._registration"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations, and that torchvision is not there
        exported = torch.onnx.export(program, (), dynamo=True, optimize=False, opset_version=OPSET, verbose=False)
    assert exported is not None
    graph = exported.model
    graph.ir_version = IR_VERSION
    for value in graph.graph.initializers.values():
        if value.name and value.name.startswith(PREFIX):
            value.const_value = None  # fake: the optimizer must not read it
    return graph


def _example(spec: InputSpec, float_type: torch.dtype) -> torch.Tensor:
    # 2 rows: torch.export takes an axis of 1 for a constant
    shape = [2 if isinstance(d, str) else d for d in spec.shape]
    return torch.zeros(shape, dtype=float_type if spec.dtype == "float" else getattr(torch, spec.dtype))


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
