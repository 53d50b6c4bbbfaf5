"""Requires: weights without values. Does: folds shape arithmetic. Ensures: no Sequence ops, no dead nodes."""

from __future__ import annotations

import onnx_ir as ir
import onnxscript.optimizer

from exporter.lower.passes import quiet


class FoldConstants(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        # Small limits: a position table or a weight must never be folded into a new dense constant.
        with quiet("onnx_ir.passes.common.initializer_deduplication"):  # it warns of weights, which come later
            onnxscript.optimizer.optimize_ir(model, input_size_limit=1024, output_size_limit=1024)
        return ir.passes.PassResult(model, modified=True)
