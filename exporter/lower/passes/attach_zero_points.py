"""Requires: identical weights shared already. Does: gives zero points their zeros. Ensures: each weight has its own.

ONNX Runtime on AVX2 turns int8 weights into uint8 one by one, their zero points with them, and fails on a zero point
that two weights share.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporter.modules import ZERO_POINTS


class AttachZeroPoints(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for value in model.graph.initializers.values():
            if value.const_value is None and value.name and value.name.endswith(ZERO_POINTS):
                assert value.shape is not None and value.dtype is not None
                zeros = np.zeros([int(d) for d in value.shape], value.dtype.numpy())  # type: ignore[arg-type]
                value.const_value = ir.Tensor(zeros, dtype=value.dtype, name=value.name)
        return ir.passes.PassResult(model, modified=True)
