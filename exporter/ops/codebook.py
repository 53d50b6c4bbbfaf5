"""CodebookDequantizeLinear: weights that a graph decodes by looking their codes up in a table.

    weight = codebook[codes + entries / 2]        codes: INT4 or INT8; codebook: [entries], 16 or 256 of them

One node with a model-local function body of standard nodes: a runtime that has a kernel of this name uses that, any
other inlines the body. The body begins with a DequantizeLinear, since that is what no constant folder expands, and so
what keeps the weight compressed. Source: facts.md section 1, the forms measured on TensorRT-RTX and ONNX Runtime.
"""

from __future__ import annotations

import onnx_ir as ir
import torch

DOMAIN, NAME, VERSION = "export_engine", "CodebookDequantizeLinear", 1
ENTRIES = {"INT4": 16, "INT8": 256}  # of the table, by the type that holds the codes


def dequantize(codes: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Emits the op for codes of any shape."""
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{NAME}",
        [codes, codebook],
        {"vector_size": 1},
        dtype=codebook.dtype,
        shape=codes.shape,
        version=VERSION,
    )


def reference(codes: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Computes what the op computes, for signed codes."""
    return codebook[codes.int() + len(codebook) // 2]


def codebook_of(values: torch.Tensor, onnx_type: str) -> torch.Tensor:
    """Returns the table in which unsigned codes, their bits read as a signed `onnx_type`, find `values`.

    The upper half of the codes is negative then, so the table is that of the values rolled by half; what has no code
    is 0.
    """
    table = values.new_zeros(ENTRIES[onnx_type])
    table[: len(values)] = values
    return table.roll(len(table) // 2)


def function(opset: int) -> ir.Function:
    """Returns the op's body; its nodes have no names, since ONNX Runtime refuses two of one where it inlines."""
    codes, codebook = ir.Value(name="codes"), ir.Value(name="codebook")
    one, two = _constant(1.0, ir.DataType.FLOAT, "one"), _constant(2, ir.DataType.INT64, "two")
    real = ir.node("DequantizeLinear", [codes, one.outputs[0]])
    signed = ir.node("Cast", real.outputs, {"to": ir.DataType.INT32})
    size = ir.node("Size", [codebook])
    half = ir.node("Div", [size.outputs[0], two.outputs[0]])
    shift = ir.node("Cast", half.outputs, {"to": ir.DataType.INT32})
    index = ir.node("Add", [signed.outputs[0], shift.outputs[0]])
    weight = ir.node("Gather", [codebook, index.outputs[0]], {"axis": 0})
    nodes = [one, two, real, signed, size, half, shift, index, weight]
    for node in nodes:
        node.name = ""
    body = ir.Graph([codes, codebook], weight.outputs, nodes=nodes, opset_imports={"": opset}, name=NAME)
    return ir.Function(DOMAIN, NAME, graph=body, attributes=[ir.Attr("vector_size", ir.AttributeType.INT, 1)])


def _constant(value: float, dtype: ir.DataType, name: str) -> ir.Node:
    return ir.node("Constant", [], {"value": ir.tensor(value, dtype=dtype, name=name)})
