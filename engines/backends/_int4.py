"""INT4 weights beside INT8 activations, as ONNX Runtime runs them: it multiplies INT8 by INT8, and only that.

Left alone, such a weight is decoded to float at every run and multiplied in float. A Cast of its codes is folded when a
session is opened: the file keeps 4 bits to a weight, memory holds 8.
"""

from __future__ import annotations

import math

import onnx
from onnx import TensorProto, helper


def widen(model: onnx.ModelProto) -> dict[str, int]:
    """Adds those casts in place; returns by module the bytes that its weight takes in memory beyond the file."""
    graph = model.graph
    codes = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.INT4}
    maker = {value: node for node in graph.node for value in node.output}
    matmuls = {node.input[1]: node for node in graph.node if node.op_type == "MatMul"}
    found: dict[str, int] = {}
    cast: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in codes:
            reader = matmuls.get(node.output[0])
            beside = maker.get(reader.input[0]) if reader is not None else None
            if beside is not None and beside.op_type == "DequantizeLinear":
                name = f"{node.input[0]}/int8"
                if name not in cast:  # layers may share a weight
                    nodes.append(
                        helper.make_node("Cast", [node.input[0]], [name], f"{node.name}/Cast", to=TensorProto.INT8)
                    )
                    found[node.name.rpartition("/")[0]] = math.prod(codes[node.input[0]].dims) // 2
                    cast.add(name)
                node.input[0] = name
        nodes.append(node)
    if found:
        del graph.node[:]
        graph.node.extend(nodes)
    return found
