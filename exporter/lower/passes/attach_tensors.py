"""Requires: weights without values, under a module's names. Does: gives each the module's tensor, read late.

Ensures: floats lie in the graph's type; of a weight no second copy is made before it is written.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray


class AttachTensors(ir.passes.InPlacePass):
    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for value in model.graph.initializers.values():
            if value.const_value is None:
                self._attach(value)
        return ir.passes.PassResult(model, modified=True)

    def _attach(self, value: ir.Value) -> None:
        assert value.name is not None and value.dtype is not None
        name, dtype, tensor = value.name, value.dtype, self.tensors[value.name]
        value.const_value = ir.LazyTensor(
            lambda: ir.Tensor(_array(tensor).astype(dtype.numpy()), dtype=dtype, name=name),
            dtype=dtype, shape=ir.Shape(tensor.shape), name=name,
        )  # fmt: skip


def _array(tensor: torch.Tensor) -> NDArray[np.generic]:
    found = tensor.detach()
    return (found.float() if found.dtype == torch.bfloat16 else found).numpy()
