"""What a graph multiplies: its matmuls, convolutions and attentions, and what quantizes or decodes their operands.

An audit holds an engine's plan against it; see `engines.audit`.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from engines.artifacts import Json
from exporter.attention import NAME as PRODUCTS

OPS = {"MatMul": "matmul", "Gemm": "matmul", "Conv": "convolution", "Einsum": "matmul"}
ATTENTION = "attention"  # two products of what the network computes, with no weight in them


def multiplications(model: ir.Model) -> list[Json]:
    """Returns, in the graph's order, one entry per matmul and convolution, and one per attention.

    `layer` is the module, `nodes` what multiplies, `quantizers` the pairs of Q and DQ nodes that its operands come
    from, operand by operand (None: float), `decoders` the nodes that make its weight of constants.
    """
    constant = _constants(model)
    found: dict[tuple[str, str], Json] = {}
    for node in model.graph:
        if node.op_type not in OPS or len(node.inputs) < 2:
            continue
        operands = [value for value in node.inputs[:2] if value is not None]
        weights = [value for value in operands if value in constant]
        name = node.name or ""
        path = name.rpartition("/")[0].removesuffix(f".{PRODUCTS}")
        op = OPS[node.op_type] if weights else ATTENTION
        entry: Json = {"layer": path, "op": op, "nodes": [], "quantizers": [], "decoders": []}
        entry = found.setdefault((path, op if op == ATTENTION else name), entry)
        entry["nodes"].append(name)
        entry["quantizers"] += [_quantizers(value) for value in operands if value not in constant]
        entry["decoders"] += [one for value in weights for one in _makers(value)]
    return list(found.values())


def _constants(model: ir.Model) -> set[ir.Value]:
    """Returns the values that are the same whatever the network is fed."""
    found = set(model.graph.initializers.values())
    for node in model.graph:
        if all(value is None or value in found for value in node.inputs):
            found |= set(node.outputs)
    return found


def _quantizers(value: ir.Value) -> list[str] | None:
    """Returns the Q and the DQ node that an operand comes out of, None where it is float."""
    last = value.producer()
    if last is None or last.op_type != "DequantizeLinear":
        return None
    first = last.inputs[0].producer() if last.inputs[0] is not None else None
    return None if first is None else [first.name or "", last.name or ""]


def _makers(value: ir.Value) -> list[str]:
    """Returns the nodes that a constant is made by, those nearest to it first."""
    node = value.producer()
    if node is None:
        return []
    inputs = [one for one in node.inputs if one is not None]
    return [node.name or "", *(name for one in inputs for name in _makers(one))]


def check_quantized(found: list[Json], layers: Mapping[str, Mapping[str, str | None]]) -> None:
    """Checks that every layer whose activation is to be quantized reads a quantized one: else a fault of ours."""
    for entry in found:
        asked = layers.get(entry["layer"], {}).get("activation")
        if asked and entry["op"] != ATTENTION and None in entry["quantizers"]:
            raise AssertionError(f"layer {entry['layer']!r}: it is to read {asked}, and nothing quantizes its input")
