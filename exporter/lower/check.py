"""What a written graph must be: valid ONNX, of allowed nodes and types, its weights the bytes their formats promise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from engines.artifacts import Json
from exporter.lower.multiplications import check_quantized, multiplications
from exporter.ops import codebook
from exporter.specs import LayerSpec

# Ops that ONNX Runtime and both TensorRTs were seen to take in lowered denoisers; a new one is added with that proof.
OPS = frozenset(
    """
    Add Cast Clip Concat Constant Conv Cos DequantizeLinear Div Einsum Equal Erf Exp Expand Flatten Gather Gelu Gemm
    GroupNormalization Identity LayerNormalization MatMul Mul Neg Pad Pow QuantizeLinear Range Reciprocal ReduceMean
    Reshape Resize Shape Sigmoid Sin Slice Softmax Split Sqrt Squeeze Sub Tanh Transpose Unsqueeze Where
    """.split()
)
OURS = frozenset([f"{codebook.DOMAIN}::{codebook.NAME}"])
DECODERS = ("DequantizeLinear", codebook.NAME)  # what reads a layer's codes
TYPES = frozenset("FLOAT FLOAT16 INT64 INT32 BOOL INT8 INT4 FLOAT8E4M3FN FLOAT8E5M2".split())


def check_graph(path: Path, specs: Mapping[str, LayerSpec], shapes: Mapping[str, tuple[int, ...]]) -> Json:
    """Checks a written graph; a violation is a fault of ours.

    Returns what a manifest says of it: bytes per initializer type, and of those that each module's nodes read, and what
    it multiplies.
    """
    onnx.checker.check_model(str(path), full_check=True)
    model = ir.load(path)
    if alien := sorted({n.op_type if not n.domain else f"{n.domain}::{n.op_type}" for n in model.graph} - OPS - OURS):
        raise AssertionError(f"{path}: ops that no backend was tested with: {', '.join(alien)}")
    found: dict[str, int] = {}
    for name, value in model.graph.initializers.items():
        assert value.dtype is not None and value.const_value is not None
        if value.dtype.name not in TYPES:
            raise AssertionError(f"{path}: initializer {name!r} is {value.dtype.name}")
        found[value.dtype.name] = found.get(value.dtype.name, 0) + value.const_value.nbytes
    nodes: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        nodes.setdefault((node.name or "").rpartition("/")[0], []).append(node)
    for layer, spec in specs.items():
        _check_codes(nodes.get(layer, []), layer, spec, shapes[layer])
    multiplied = multiplications(model)
    check_quantized(multiplied, {path: spec.engine_types for path, spec in specs.items()})
    return {
        "initializer_bytes": dict(sorted(found.items())),
        "weight_bytes": sum(found.values()),
        "module_bytes": {module: size for module, own in nodes.items() if (size := _constant_bytes(own))},
        "multiplications": multiplied,
    }


def _constant_bytes(nodes: Sequence[ir.Node]) -> int:
    """Returns the bytes of the initializers that nodes read, each counted once."""
    read = {value.name: value for node in nodes for value in node.inputs if value is not None}
    return sum(v.const_value.nbytes for v in read.values() if v.is_initializer() and v.const_value is not None)


def _check_codes(nodes: Sequence[ir.Node], layer: str, spec: LayerSpec, shape: tuple[int, ...]) -> None:
    """Checks the type and size of one layer's codes, found through what decodes them (identical ones are shared)."""
    decoders = [node for node in nodes if node.op_type in DECODERS]
    codes = [n.inputs[0] for n in decoders if n.inputs[0] is not None and n.inputs[0].is_initializer()]
    if len(codes) != 1 or codes[0] is None or codes[0].const_value is None:
        raise AssertionError(f"layer {layer!r}: {len(codes)} weights in the graph where one was written")
    fmt: Any = spec.weight
    stored_bits = fmt.bits / fmt.vector_size if fmt.learned else 4 if fmt.onnx_type == "INT4" else 8
    want = math.ceil(math.prod(shape) * stored_bits / 8)
    tensor = codes[0].const_value
    if tensor.dtype.name != spec.weight.onnx_type or tensor.nbytes != want:
        raise AssertionError(
            f"layer {layer!r}: {tensor.nbytes} bytes of {tensor.dtype.name}; its format promises {want} of "
            f"{spec.weight.onnx_type}"
        )
