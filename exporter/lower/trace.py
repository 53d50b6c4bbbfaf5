"""Traces a quantized model to ONNX under fake tensors: every initializer gets a name, and no weight is in memory."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from engines.artifacts import Artifact
from exporter import quantized, step_table, steps
from exporter.attention import QuantizedPoint
from exporter.lower.passes import quiet
from exporter.models import Axis, Family, TensorSpec
from exporter.modules import SteppedLayer
from exporter.step_table import StepTable

OPSET, IR_VERSION = 21, 10  # the oldest pair that carries FP8 and INT4: the most runtimes read it
PREFIX = "model."  # of every name, from the wrapper below; the passes take it off
STEP, STEP_ROW = "step", "step_row"  # inputs: the step of every row, or what the table holds for it
TORCH_TYPES = {"fp32": torch.float32, "fp16": torch.float16}


class _Call(nn.Module):
    """Calls the denoiser as its family does, with the inputs in order; steps, or the table's rows, come last."""

    def __init__(self, model: nn.Module, family: Family, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self._family, self._names = model, family, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        feeds = dict(zip(self._names, inputs, strict=True))
        position = None
        if STEP in feeds or STEP_ROW in feeds:
            rows = feeds.pop(STEP_ROW) if STEP_ROW in feeds else self._rows(feeds.pop(STEP))
            position = steps.Position(rows, torch.split(rows, 1, dim=1))
        with steps.at(position):
            return self._family.call(self.model, feeds)

    def _rows(self, step: torch.Tensor) -> torch.Tensor:
        return self.model.get_buffer(step_table.NAME).index_select(0, step)


def inputs_of(family: Family, table: StepTable | None, step_input: str) -> tuple[TensorSpec, ...]:
    """Returns the graph's inputs: the family's, and where activations have a scale for every step what says which."""
    if table is None:
        return family.inputs()
    by_row = TensorSpec(STEP_ROW, "fp32", ("batch", table.values.shape[1]))
    return (*family.inputs(), by_row if step_input == "row" else TensorSpec(STEP, "int64", ("batch",)))


def trace(artifact: Artifact, dtype: str, table: StepTable | None, step_input: str) -> ir.Model:
    """Returns the graph of a Quantized artifact in `dtype`."""
    return trace_model(lambda: quantized.build(artifact), quantized.family(artifact), dtype, table, step_input)


def trace_model(
    build: Callable[[], nn.Module], family: Family, dtype: str, table: StepTable | None, step_input: str
) -> ir.Model:
    """Returns the graph of what `build` makes; its weights have names, types and shapes but no values yet."""
    specs, axes = inputs_of(family, table, step_input), family.axes()
    with default_dtype(TORCH_TYPES[dtype]), FakeTensorMode(allow_non_fake_inputs=True):
        model = build()
        if table is not None:
            for path, columns in table.columns.items():
                cast(SteppedLayer | QuantizedPoint, model.get_submodule(path)).columns = columns
            if step_input == "index":
                model.register_buffer(step_table.NAME, torch.empty(table.values.shape, dtype=torch.float32))
        call = _Call(model, family, [spec.name for spec in specs])
        program = export(call, specs, axes, dtype)
    return graph_of(program)


def export(call: nn.Module, specs: Sequence[TensorSpec], axes: Mapping[str, Axis], dtype: str) -> ExportedProgram:
    """Exports a module that takes `specs` in order, as its one variadic argument `inputs`."""
    inputs = tuple(_example(spec, axes, TORCH_TYPES[dtype]) for spec in specs)
    # AUTO: what diffusers decides by size (memory layout at 64 rows) would else bound an axis; that none became a
    # constant is checked where the axes are named.
    auto = torch.export.Dim.AUTO
    shapes = tuple({d: auto for d, n in enumerate(s.shape) if isinstance(n, str)} for s in specs)
    return torch.export.export(call, inputs, dynamic_shapes={"inputs": shapes}, strict=False)


def graph_of(program: ExportedProgram) -> ir.Model:
    """Returns the graph of an exported module; its weights, whose names start with PREFIX, have no values."""
    with quiet("torch.onnx._internal.exporter._registration"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations, and that torchvision is not there
        exported = torch.onnx.export(program, (), dynamo=True, optimize=False, opset_version=OPSET, verbose=False)
    assert exported is not None
    graph = exported.model
    graph.ir_version = IR_VERSION
    for value in graph.graph.initializers.values():
        if value.name and value.name.startswith(PREFIX):
            value.const_value = None  # fake, or large: the optimizer must not read it
    return graph


def _example(spec: TensorSpec, axes: Mapping[str, Axis], float_type: torch.dtype) -> torch.Tensor:
    types = {"float": float_type, "fp32": torch.float32, "int64": torch.int64}
    # An example's axes must not be 1, which torch.export takes for a constant.
    shape = [max(axes[d].opt, 2 * axes[d].multiple) if isinstance(d, str) else d for d in spec.shape]
    return torch.zeros(shape, dtype=types[spec.dtype])


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
