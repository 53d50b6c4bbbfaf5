"""CodebookDequantizeLinear: weights that a graph decodes by looking their codes up in a table.

    scalar      codes of any shape, INT4 or INT8; codebook [entries]: weight[i] = codebook[codes[i] + entries / 2]
    vectors     codes [out, n], INT4 or INT8; codebook [entries, d]: weight [out, n · d], entries as above
    vectors6    codes [out, n / 2, 3] INT4, two codes in three nibbles less 8; codebook [64, d]: as above

One node with a model-local function body of standard nodes: a runtime that has a kernel of this name uses that, any
other inlines the body; the three are overloads of one name. A body begins with a DequantizeLinear, since that is what
no constant folder expands, and so what keeps the weight compressed. Source: facts.md section 1, the forms measured on
TensorRT-RTX and ONNX Runtime.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

DOMAIN, NAME, VERSION = "export_engine", "CodebookDequantizeLinear", 1
# TensorRT's parser takes a plugin of a node's name where this attribute names its namespace, else the body. Source:
# facts.md section 2; no such plugin exists yet.
PLUGIN = "plugin_namespace"
ENTRIES = {"INT4": 16, "INT8": 256}  # of the table, by the type that holds the codes


def dequantize(codes: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Emits the op: for codes of any shape and a table [entries], or for codes [out, n] and codewords [entries, d]."""
    vector_size = codebook.shape[1] if codebook.ndim == 2 else 1
    attributes: dict[str, Any] = {"vector_size": vector_size, "bits": _bits(len(codebook)), PLUGIN: DOMAIN}
    shape = codes.shape if codebook.ndim == 1 else torch.Size([codes.shape[0], codes.shape[1] * vector_size])
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{NAME}", [codes, codebook], attributes, dtype=codebook.dtype, shape=shape, version=VERSION
    )


def _bits(entries: int) -> int:
    return entries.bit_length() - 1


def overload(node: ir.Node) -> str:
    """Returns which body an emitted node has: by the rank of its codebook and the bits of its codes."""
    codebook = node.inputs[1]
    assert codebook is not None and codebook.shape is not None
    if len(codebook.shape) == 1:
        return ""
    return "vectors6" if node.attributes["bits"].as_int() == 6 else "vectors"


def reference(codes: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Computes what the op computes, for signed codes; those of 6 bits come as nibbles, [out, n / 2, 3]."""
    if codebook.ndim == 1:
        return codebook[codes.int() + len(codebook) // 2]
    if codes.ndim == 3:
        first, middle, last = (codes.int() + 8).unbind(-1)
        index = torch.stack([first * 4 + middle // 4, middle % 4 * 16 + last], dim=-1).flatten(1)
    else:
        index = codes.int() + len(codebook) // 2
    return codebook[index].flatten(1)


def codebook_of(values: torch.Tensor, onnx_type: str) -> torch.Tensor:
    """Returns the table in which unsigned codes, their bits read as a signed `onnx_type`, find `values`.

    The upper half of the codes is negative then, so the table is that of the values rolled by half; what has no code
    is 0. Codewords [entries, d] are rolled alike.
    """
    table = values.new_zeros(ENTRIES[onnx_type], *values.shape[1:])
    table[: len(values)] = values
    return table.roll(len(table) // 2, dims=0)


def function(opset: int, overload: str) -> ir.Function:
    """Returns an overload's body; its nodes have no names, since ONNX Runtime refuses two of one where it inlines."""
    body = _Body()
    codes, codebook = ir.Value(name="codes"), ir.Value(name="codebook")
    real = body.node("DequantizeLinear", [codes, body.constant(1.0, ir.DataType.FLOAT)])
    signed = body.node("Cast", [real], to=ir.DataType.INT32)
    if overload == "vectors6":
        index = _from_nibbles(body, signed)
    else:
        entries = body.node("Shape", [codebook], start=0, end=1)
        half = body.node("Div", [entries, body.constant(2, ir.DataType.INT64)])
        index = body.node("Add", [signed, body.node("Cast", [half], to=ir.DataType.INT32)])
    weight = body.node("Gather", [codebook, index], axis=0)
    if overload:
        weight = body.node("Reshape", [weight, body.constant([0, -1], ir.DataType.INT64)])
    for node in body.nodes:
        node.name = ""
    graph = ir.Graph([codes, codebook], [weight], nodes=body.nodes, opset_imports={"": opset}, name=NAME)
    attributes = [ir.AttrInt64("vector_size", 1), ir.AttrInt64("bits", 1), ir.AttrString(PLUGIN, DOMAIN)]
    return ir.Function(DOMAIN, NAME, overload, graph=graph, attributes=attributes)


class _Body:
    """The nodes of a function, in order."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def node(self, op: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        self.nodes.append(ir.node(op, inputs, attributes))
        return self.nodes[-1].outputs[0]

    def constant(self, value: float | list[int], dtype: ir.DataType) -> ir.Value:
        tensor = ir.tensor(value, dtype=dtype, name=f"constant_{len(self.nodes)}")
        self.nodes.append(ir.node("Constant", [], {"value": tensor}))
        return self.nodes[-1].outputs[0]


def _from_nibbles(body: _Body, signed: ir.Value) -> ir.Value:
    """Returns the codes [out, n / 2, 2] of nibbles [out, n / 2, 3] that were read as signed."""
    four, sixteen, eight = (body.constant(value, ir.DataType.INT32) for value in (4, 16, 8))
    last_axis = body.constant([2], ir.DataType.INT64)
    nibbles = body.node("Add", [signed, eight])
    first, middle, last = (
        body.node("Gather", [nibbles, body.constant(i, ir.DataType.INT64)], axis=2) for i in range(3)
    )
    high = body.node("Div", [middle, four])
    low = body.node("Sub", [middle, body.node("Mul", [high, four])])
    one = body.node("Add", [body.node("Mul", [first, four]), high])
    other = body.node("Add", [body.node("Mul", [low, sixteen]), last])
    pair = [body.node("Unsqueeze", [value, last_axis]) for value in (one, other)]
    return body.node("Concat", pair, axis=2)
