"""Requires: values named after the traced nodes. Does: puts in torch's own values for what depends on no input.

Ensures: tables such as a timestep embedding's frequencies are bit for bit those of the PyTorch model. Left to constant
folding, which computes in numpy, 57 of 128 frequencies came out one unit in the last place off; a timestep of 999
multiplies that.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch.export import ExportedProgram

MAX_ELEMENTS = 1 << 20  # a table, not a weight


class UseTorchConstants(ir.passes.InPlacePass):
    def __init__(self, constants: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.constants = constants

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        for node in tuple(graph):
            for value in node.outputs:
                tensor = self.constants.get(value.name or "")
                if tensor is None or value.dtype is None or value.dtype.numpy() != tensor.numpy().dtype:
                    continue
                constant = ir.Value(name=f"{value.name}_constant", type=value.type, shape=ir.Shape(tensor.shape))
                constant.const_value = ir.Tensor(tensor.numpy(), name=constant.name)
                graph.register_initializer(constant)
                value.replace_all_uses_with(constant)
        return ir.passes.PassResult(model, modified=True)


def torch_constants(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """Returns, by name, the floating-point tensors that a traced program computes from no input and no weight."""
    made: dict[str, torch.Tensor] = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or not _is_table(node):
            continue
        if any(source.name not in made for source in node.all_input_nodes):
            continue
        arguments = torch.fx.node.map_arg((node.args, node.kwargs), lambda source: made[source.name])
        made[node.name] = node.target(*arguments[0], **arguments[1])
    return {name: tensor.contiguous() for name, tensor in made.items() if tensor.is_floating_point()}


def _is_table(node: torch.fx.Node) -> bool:
    fake, tags = node.meta.get("val"), getattr(node.target, "tags", ())
    if not isinstance(fake, torch.Tensor) or torch.Tag.nondeterministic_seeded in tags:
        return False
    return all(isinstance(size, int) for size in fake.shape) and fake.numel() <= MAX_ELEMENTS
