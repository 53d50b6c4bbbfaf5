"""Model-local functions, written out where they are called: for parsers that cannot take one that is called twice."""

from __future__ import annotations

import onnx


def written_out(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replaces calls of the model's functions by their bodies, in place; functions that call functions are not ours.

    A node of a body is named `<op>_<position> | <call> (<function>)`, as TensorRT's own plans name what it inlined.
    """
    functions = {(function.domain, function.name, function.overload): function for function in model.functions}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        function = functions.get((node.domain, node.op_type, node.overload))
        nodes += [node] if function is None else _body(function, node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.functions[:]
    return model


def _body(function: onnx.FunctionProto, call: onnx.NodeProto) -> list[onnx.NodeProto]:
    names = dict(zip(function.input, call.input, strict=True)) | dict(zip(function.output, call.output, strict=True))
    found = []
    for position, node in enumerate(function.node):
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = f"{node.op_type}_{position} | {call.name} ({call.op_type})"
        copy.input[:] = [names.get(value, f"{call.name}/{value}") for value in node.input]
        copy.output[:] = [names.get(value, f"{call.name}/{value}") for value in node.output]
        found.append(copy)
    return found
