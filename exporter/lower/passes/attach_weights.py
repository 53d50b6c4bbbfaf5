"""Requires: weights without values, under the quantized model's names. Does: gives each its stored bytes, read late.

Ensures: codes lie in their quantized type (INT4 and INT8 for what torch traced as bytes), floats in the graph's type.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import onnx_ir as ir
import torch

from engines.errors import UserError
from exporter import step_table
from exporter.modules import DERIVED, UNITS, ZERO_POINTS, step_unit
from exporter.ops import codebook
from exporter.quantized import Tensors
from exporter.specs import LayerSpec
from exporter.step_table import StepTable

INT4_VALUES = torch.arange(-8.0, 8.0)  # what integers of up to 4 bits are, where they are looked up
NUMPY_VIEWS = {torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn, torch.float8_e5m2: ml_dtypes.float8_e5m2}


class AttachWeights(ir.passes.InPlacePass):
    def __init__(self, stored: Tensors, specs: Mapping[str, LayerSpec], table: StepTable | None) -> None:
        super().__init__()
        self.stored, self.specs, self.table = stored, specs, table

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for value in model.graph.initializers.values():
            if value.const_value is None and value.name and not value.name.endswith(ZERO_POINTS):
                attach = self._attach_derived if value.name.endswith((*DERIVED, step_table.NAME)) else self._attach
                attach(value)
        return ir.passes.PassResult(model, modified=True)

    def _attach_derived(self, value: ir.Value) -> None:
        assert value.name is not None and value.dtype is not None
        owner, _, leaf = value.name.rpartition(".")
        if leaf == step_table.NAME:
            assert self.table is not None
            found = self.table.values
        elif leaf in UNITS:
            found = step_unit(self.stored.raw(f"{owner}.activation_scale"))
        elif leaf == "weight_table":
            fmt = self.specs[owner].weight
            found = INT4_VALUES if fmt.native else codebook.codebook_of(fmt.values, fmt.onnx_type)
        else:
            found = torch.ones(())
        value.const_value = ir.Tensor(found.numpy().astype(value.dtype.numpy()), dtype=value.dtype, name=value.name)

    def _attach(self, value: ir.Value) -> None:
        assert value.name is not None and value.shape is not None and value.dtype is not None
        name, shape = value.name, tuple(int(d) for d in value.shape)  # type: ignore[arg-type]
        owner, _, leaf = name.rpartition(".")
        if name not in self.stored:
            raise UserError(f"the quantized model holds no tensor {name!r}", fix="quantize the model again")
        read = self.stored.raw
        if leaf == "weight_codes" and owner in self.specs:
            fmt = self.specs[owner].weight
            value.type = ir.TensorType(ir.DataType[fmt.onnx_type])
            if fmt.learned and fmt.bits == 6:  # two codes in three nibbles
                shape = (shape[0], shape[1] // 2, 3)
                value.shape = ir.Shape(shape)
        elif leaf == "weight_codebook" and self.specs[owner].weight.bits != 6:
            onnx_type = self.specs[owner].weight.onnx_type

            def read(name: str) -> torch.Tensor:
                return codebook.codebook_of(self.stored.raw(name), onnx_type)

        dtype = value.dtype
        value.const_value = ir.LazyTensor(
            lambda: _tensor(read(name), dtype, shape, name), dtype=dtype, shape=ir.Shape(shape), name=name
        )


def _tensor(raw: torch.Tensor, dtype: ir.DataType, shape: tuple[int, ...], name: str) -> ir.TensorProtocol:
    if dtype == ir.DataType.INT4:
        return ir.PackedTensor(raw.numpy(), dtype=dtype, shape=ir.Shape(shape), name=name)
    if raw.dtype in NUMPY_VIEWS:
        array = raw.view(torch.uint8).numpy().view(NUMPY_VIEWS[raw.dtype])
    elif raw.dtype == torch.uint8:  # codes to be looked up: their bits, as the table expects them
        array = raw.numpy().view(dtype.numpy())
    else:
        array = raw.numpy().astype(dtype.numpy())
    return ir.Tensor(array.reshape(shape), dtype=dtype, name=name)
