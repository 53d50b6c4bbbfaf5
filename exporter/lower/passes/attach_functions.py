"""Requires: constants folded. Does: gives ops of ours their bodies. Ensures: any runtime can run the graph.

Attached last of all that rewrites nodes: an optimizer that sees a body inlines it and folds it into a dense weight.
"""

from __future__ import annotations

import onnx_ir as ir

from exporter.ops import codebook


class AttachFunctions(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if used := any(node.domain == codebook.DOMAIN for node in model.graph):
            body = codebook.function(model.opset_imports[""])
            model.functions[body.identifier()] = body
            model.opset_imports[codebook.DOMAIN] = codebook.VERSION
        return ir.passes.PassResult(model, modified=used)
