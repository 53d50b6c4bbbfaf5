"""INT4 weights beside INT8 activations, as ONNX Runtime runs them: it multiplies INT8 by INT8, and only that.

Left alone, such a weight is decoded to float at every run and multiplied in float. A Cast of its codes is folded when a
session is opened: the file keeps 4 bits to a weight, memory holds 8.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def widen(model: onnx.ModelProto) -> dict[str, int]:
    """Adds those casts in place; returns by module the bytes that its weight takes in memory beyond the file."""
    graph = model.graph
    codes = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.INT4}
    dims = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    maker = {value: node for node in graph.node for value in node.output}
    matmuls = {node.input[1]: node for node in graph.node if node.op_type == "MatMul"}
    found: dict[str, int] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in codes:
            reader = matmuls.get(node.output[0])
            beside = maker.get(reader.input[0]) if reader is not None else None
            if beside is not None and beside.op_type == "DequantizeLinear":
                module = node.name.rpartition("/")[0]
                name = f"{module}/int8"
                nodes.append(helper.make_node("Cast", [node.input[0]], [name], f"{name}_cast", to=TensorProto.INT8))
                found[module] = math.prod(codes[node.input[0]].dims) // 2
                # on AVX2 it turns int8 weights into uint8, and fails where their zero point is left out or shared
                graph.initializer.append(
                    numpy_helper.from_array(np.zeros(dims[node.input[1]], np.int8), f"{name}_zero")
                )
                node.input[:] = [name, node.input[1], f"{name}_zero"]
        nodes.append(node)
    if found:
        del graph.node[:]
        graph.node.extend(nodes)
    return found
