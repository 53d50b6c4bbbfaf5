"""Requires: the exporter's scope metadata. Does: names nodes and interface. Ensures: plans map back to modules,
and every axis that a family calls dynamic is.

A node is named `<module path>/<op>`, numbered where a module holds several; inputs, outputs and dynamic axes get the
family's names; weights lose the tracing wrapper's prefix.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Sequence

import onnx_ir as ir

from exporter.models import TensorSpec

SCOPES = "pkg.torch.onnx.name_scopes"


class NameAfterModules(ir.passes.InPlacePass):
    def __init__(self, prefix: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        super().__init__()
        self.prefix, self.specs = prefix, (*inputs, *outputs)

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
        for value, spec in zip((*graph.inputs, *graph.outputs), self.specs, strict=True):
            self._check_axes(value, spec)
            value.name, value.shape = spec.name, ir.Shape(spec.shape)
        return ir.passes.PassResult(model, modified=True)

    def _module(self, node: ir.Node) -> str:
        text = node.metadata_props.get(SCOPES)
        scopes = ast.literal_eval(text) if text else []
        modules = [s for s in scopes[:-1] if s.startswith(self.prefix)]
        return modules[-1].removeprefix(self.prefix) if modules else ""

    def _check_axes(self, value: ir.Value, spec: TensorSpec) -> None:
        assert value.shape is not None
        for size, wanted in zip(value.shape, spec.shape, strict=True):
            if isinstance(size, ir.SymbolicDim) != isinstance(wanted, str) or (
                size != wanted and isinstance(size, int)
            ):
                raise AssertionError(f"{spec.name}: traced as {list(value.shape)}, its family says {list(spec.shape)}")
