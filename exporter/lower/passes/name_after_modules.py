"""Requires: the exporter's scope metadata. Does: names nodes and interface. Ensures: plans map back to modules.

A node is named `<module path>/<op>`, numbered where a module holds several; inputs, outputs and dynamic axes get the
family's names; weights lose the tracing wrapper's prefix.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Sequence

import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"


class NameAfterModules(ir.passes.InPlacePass):
    def __init__(self, prefix: str, inputs: Sequence[str], output: str, axes: Sequence[str]) -> None:
        super().__init__()
        self.prefix, self.inputs, self.output, self.axes = prefix, inputs, output, axes

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        for name in [n for n in graph.initializers if n.startswith(self.prefix)]:
            value = graph.initializers.pop(name)
            value.name = name.removeprefix(self.prefix)
            graph.initializers[value.name] = value
        seen: Counter[str] = Counter()
        for node in graph:
            name = f"{self._module(node)}/{node.op_type}".lstrip("/")
            node.name = f"{name}_{seen[name]}" if seen[name] else name
            seen[name] += 1
        for value, name in zip(graph.inputs, self.inputs, strict=True):
            value.name = name
        graph.outputs[0].name = self.output
        self._name_axes(graph)
        return ir.passes.PassResult(model, modified=True)

    def _module(self, node: ir.Node) -> str:
        text = node.metadata_props.get(SCOPES)
        scopes = ast.literal_eval(text) if text else []
        modules = [s for s in scopes[:-1] if s.startswith(self.prefix)]
        return modules[-1].removeprefix(self.prefix) if modules else ""

    def _name_axes(self, graph: ir.Graph) -> None:
        # Every family has one dynamic axis so far, so every symbol stands for it.
        (axis,) = self.axes
        for value in (*graph.inputs, *graph.outputs):
            assert value.shape is not None
            value.shape = ir.Shape([axis if isinstance(d, ir.SymbolicDim) else d for d in value.shape])
