"""Requires: weights attached. Does: keeps one of several identical initializers. Ensures: no bytes are stored twice."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import DeduplicateHashedInitializersPass

from exporter.lower.passes import quiet


class ShareInitializers(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        with quiet("onnx_ir.passes.common.initializer_deduplication"):  # it warns of zero points, which come later
            return DeduplicateHashedInitializersPass()(model)
