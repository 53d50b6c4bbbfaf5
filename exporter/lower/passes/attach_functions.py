"""Requires: constants folded. Does: gives ops of ours their bodies. Ensures: any runtime can run the graph.

Attached last of all that rewrites nodes: an optimizer that sees a body inlines it and folds it into a dense weight.
"""

from __future__ import annotations

import onnx_ir as ir

from exporter.ops import codebook


class AttachFunctions(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [node for node in model.graph if node.domain == codebook.DOMAIN]
        for node in nodes:
            node.overload = codebook.overload(node)
        for overload in sorted({node.overload for node in nodes}):
            body = codebook.function(model.opset_imports[""], overload)
            model.functions[body.identifier()] = body
        if nodes:
            model.opset_imports[codebook.DOMAIN] = codebook.VERSION
        return ir.passes.PassResult(model, modified=bool(nodes))
