"""Weights that a graph looks up, as ONNX Runtime runs them: decoded by the matmul that reads them, or at opening.

    run     decode [· scale] → transpose → matmul becomes CodebookMatMul, a function of just these nodes, which the
            native library computes in one kernel where it is registered; codes stay what they are in memory too
    load    bodies lose the DequantizeLinear that keeps constant folding away: a session opens to dense weights

Only nodes and bodies change: initializers, and external data with them, stay as they are in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import external_data_helper, helper, numpy_helper

from engines.backends._functions import written_out
from engines.errors import UserError

DAMAGED = "the graph was damaged, or written by another program: lower the model again"
FOREIGN = "lower the model with this program: another one wrote this graph"
DOMAIN, DECODE, MATMUL = "export_engine", "CodebookDequantizeLinear", "CodebookMatMul"


def rewrite(path: Path, decode: str) -> onnx.ModelProto | None:
    """Returns the graph at `path`, less external data, so that it decodes as asked; None if it decodes nothing."""
    model = onnx.load(path, load_external_data=False)
    graph = _Graph(model, path)
    decoders = [node for node in model.graph.node if (node.domain, node.op_type) == (DOMAIN, DECODE)]
    if not decoders:
        return None
    for node in decoders:
        _check(node, graph)
    if decode == "load":
        for node in decoders:
            _multiply_for_fp8(node, graph)
        for function in model.functions:
            _let_fold(function)
        written_out(model)  # under its own name the native library would decode it at every run
    else:
        for node in decoders:
            _fuse(node, graph)
    _sweep(model)
    return model


class _Graph:
    """A model's nodes, by the values they make and read, and its constants."""

    def __init__(self, model: onnx.ModelProto, path: Path) -> None:
        self.model, self.path = model, path
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.maker = {value: node for node in model.graph.node for value in node.output}
        self._readers: dict[str, list[onnx.NodeProto | None]] = {value.name: [None] for value in model.graph.output}
        for node in model.graph.node:
            for value in node.input:
                self._readers.setdefault(value, []).append(node)

    def reader(self, value: str, op_type: str) -> onnx.NodeProto | None:
        """Returns the node that alone reads a value, if it is of this type."""
        (node, *others) = self._readers.get(value, [None])
        return node if node is not None and not others and node.op_type == op_type and not node.domain else None

    def values(self, name: str) -> NDArray[Any] | None:
        """Returns a constant's numbers, from beside the graph too; None if it is no constant."""
        if name not in self.initializers:
            return None
        tensor = onnx.TensorProto()
        tensor.CopyFrom(self.initializers[name])
        try:
            if external_data_helper.uses_external_data(tensor):
                external_data_helper.load_external_data_for_tensor(tensor, str(self.path.parent))
            return numpy_helper.to_array(tensor)
        except (KeyError, ValueError, onnx.checker.ValidationError) as error:  # the first: of a type there is none of
            raise UserError(f"{self.path}: {name}: cannot be read ({error})", fix=DAMAGED) from error

    def function(self, node: onnx.NodeProto) -> onnx.FunctionProto:
        """Returns the body of a node of ours, which takes codes and their table."""
        key = (node.domain, node.op_type, node.overload)
        functions: list[onnx.FunctionProto] = list(self.model.functions)
        found = next((f for f in functions if (f.domain, f.name, f.overload) == key), None)
        if found is None or {len(found.input), len(node.input)} != {2} or {len(found.output), len(node.output)} != {1}:
            raise UserError(f"{self.path}: {node.name}: lacks a body that takes codes and a table", fix=FOREIGN)
        return found


def _sweep(model: onnx.ModelProto) -> None:
    """Removes nodes, constants and functions that nothing reads any more."""
    graph = model.graph
    live = {value.name for value in graph.output}
    for node in reversed(graph.node):
        if live.intersection(node.output):
            live.update(node.input)
    _keep(graph.node, lambda node: bool(live.intersection(node.output)))
    _keep(graph.initializer, lambda tensor: tensor.name in live)
    called = {(node.domain, node.op_type, node.overload) for node in graph.node}
    _keep(model.functions, lambda f: (f.domain, f.name, f.overload) in called)


def _keep(field: Any, wanted: Callable[[Any], bool]) -> None:
    for i in reversed(range(len(field))):
        if not wanted(field[i]):
            del field[i]


def _check(node: onnx.NodeProto, graph: _Graph) -> None:
    """Raises a UserError if a weight's codes are fewer than their shape says, or name entries that its table lacks."""
    where = f"{graph.path}: {node.name}"
    graph.function(node)  # which refuses a node that is none of ours
    codes, table = (graph.initializers.get(name) for name in node.input)
    integers = (onnx.TensorProto.INT8, onnx.TensorProto.INT4)
    if codes is None or table is None or codes.data_type not in integers or not table.dims:
        raise UserError(f"{where}: its codes and table are no constants of INT4 or INT8 codes", fix=FOREIGN)
    bits = 8 if codes.data_type == onnx.TensorProto.INT8 else 4
    wanted, found = math.ceil(math.prod(codes.dims) * bits / 8), _stored_bytes(codes)
    if found != wanted:
        raise UserError(
            f"{where}: {found} bytes of codes, where {list(codes.dims)} of {bits} bits are {wanted}",
            fix="the graph was cut short or damaged: lower the model again",
        )
    words, six = int(table.dims[0]), node.overload == "vectors6"
    if words == 1 << (6 if six else bits):  # then there is one for every code
        return
    values = graph.values(node.input[0])
    assert values is not None
    numbers = _six_bits(values.astype(np.int32) + 8) if six else values.astype(np.int32) + words // 2
    outside = numbers[(numbers < 0) | (numbers >= words)]
    if outside.size:
        raise UserError(
            f"{where}: {outside.size} codes name entries that its table of {words} lacks, {outside[0]} the first",
            fix=DAMAGED,
        )


def _stored_bytes(tensor: onnx.TensorProto) -> int:
    if external_data_helper.uses_external_data(tensor):
        return external_data_helper.ExternalDataInfo(tensor).length or 0
    return len(tensor.raw_data)


def _six_bits(nibbles: NDArray[np.int32]) -> NDArray[np.int32]:
    """Returns the codes that lie in nibbles [out, n / 2, 3], two in three: the body's own arithmetic."""
    first, middle, last = np.moveaxis(nibbles, -1, 0)
    return np.stack([first * 4 + middle // 4, middle % 4 * 16 + last])


def _fuse(node: onnx.NodeProto, graph: _Graph) -> None:
    """Makes a CodebookMatMul of the matmul that reads a weight of codewords, and of all between; else leaves it."""
    weight, scale = _scaled(node, graph) if node.overload else ("", None)
    transpose = graph.reader(weight, "Transpose")
    matmul = transpose and graph.reader(transpose.output[0], "MatMul")
    if transpose is None or matmul is None or matmul.input[1] != transpose.output[0]:
        return
    body = _matmul_body(graph.function(node), scaled=scale is not None)
    if body.overload not in {f.overload for f in graph.model.functions if f.name == MATMUL}:
        graph.model.functions.append(body)
    inputs = [matmul.input[0], *node.input, *([scale] if scale else [])]
    fused = helper.make_node(MATMUL, inputs, matmul.output, name=matmul.name, domain=DOMAIN, overload=body.overload)
    matmul.CopyFrom(fused)


def _scaled(node: onnx.NodeProto, graph: _Graph) -> tuple[str, str | None]:
    """Returns the decoded weight after its scale, [out] or [], and that scale's name; without one, the weight."""
    weight = node.output[0]
    if (pair := _exact_fp8(node, graph)) is not None and not graph.initializers[pair.input[1]].dims:
        return pair.output[0], pair.input[1]
    multiply = graph.reader(weight, "Mul")
    if multiply is None or multiply.input[0] != weight:
        return weight, None
    column = graph.maker.get(multiply.input[1])
    if column is None or column.op_type != "Reshape" or column.input[0] not in graph.initializers:
        return weight, None
    shape, rows = graph.values(column.input[1]), list(graph.initializers[column.input[0]].dims)
    if shape is None or shape.shape != (2,) or shape[1] != 1 or len(rows) != 1:
        return weight, None
    return multiply.output[0], column.input[0]


def _exact_fp8(node: onnx.NodeProto, graph: _Graph) -> onnx.NodeProto | None:
    """Returns the DequantizeLinear by which a looked-up weight leaves FP8, where all it does is to scale.

    So it does if the table holds numbers of that type only and they enter it with a scale of 1: nothing is rounded.
    """
    quantize = graph.reader(node.output[0], "QuantizeLinear")
    back = quantize and graph.reader(quantize.output[0], "DequantizeLinear")
    if quantize is None or back is None or len(quantize.input) != 3 or back.input[1] not in graph.initializers:
        return None
    table, unit = (graph.values(name) for name in (node.input[1], quantize.input[1]))
    zero = graph.initializers.get(quantize.input[2])
    if table is None or unit is None or zero is None or zero.data_type != onnx.TensorProto.FLOAT8E4M3FN:
        return None
    exact = np.array_equal(table.astype(ml_dtypes.float8_e4m3fn).astype(table.dtype), table)
    return back if exact and (unit == 1).all() and len(back.input) == 2 else None


def _matmul_body(decode: onnx.FunctionProto, *, scaled: bool) -> onnx.FunctionProto:
    """Returns the body of a CodebookMatMul: how the weight is decoded, scale, transpose, matmul."""
    body = onnx.FunctionProto()
    body.CopyFrom(decode)
    body.name, body.overload = MATMUL, f"{decode.overload}_scaled" if scaled else decode.overload
    body.input[:] = ["x", *decode.input, *(["scale"] if scaled else [])]
    body.output[:] = ["y"]
    del body.attribute[:]
    weight = decode.output[0]
    if scaled:
        column = helper.make_node("Constant", [], ["column"], value_ints=[-1, 1])
        body.node.extend([column, helper.make_node("Reshape", ["scale", "column"], ["scales"])])
        body.node.append(helper.make_node("Mul", [weight, "scales"], ["scaled"]))
        weight = "scaled"
    body.node.append(helper.make_node("Transpose", [weight], ["transposed"], perm=[1, 0]))
    body.node.append(helper.make_node("MatMul", ["x", "transposed"], ["y"]))
    return body


def _multiply_for_fp8(node: onnx.NodeProto, graph: _Graph) -> None:
    """Makes a Mul of the DequantizeLinear of an exact FP8 weight, which constant folding would leave standing."""
    back = _exact_fp8(node, graph)
    if back is None:
        return
    scale, rank = graph.initializers[back.input[1]].dims, len(graph.initializers[node.input[0]].dims)
    if not scale or (len(scale) == 1 and helper.get_node_attr_value(back, "axis") == rank - 1):
        multiply = helper.make_node("Mul", [node.output[0], back.input[1]], back.output, name=back.name)
        back.CopyFrom(multiply)


def _let_fold(function: onnx.FunctionProto) -> None:
    """Lets a body read its codes as they are: they are integers already, less what DequantizeLinear stands in for."""
    barrier = next((node for node in function.node if node.op_type == "DequantizeLinear"), None)
    if barrier is None:
        return
    for node in function.node:
        node.input[:] = [barrier.input[0] if value == barrier.output[0] else value for value in node.input]
    function.node.remove(barrier)
