"""Plans of TensorRT and TensorRT-RTX: of the builder's verbose log, or of an engine inspector's JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from engines.errors import UserError
from engines.plans import PlanRow, multiplied_as, tensor_bytes

TYPES = {
    "Float": "fp32", "Half": "fp16", "BFloat16": "bf16", "FP8": "fp8", "FP4": "fp4", "Int8": "int8", "Int4": "int4",
    "Int32": "int32", "Int64": "int64", "Bool": "bool", "UInt8": "uint8",
}  # fmt: skip
# What TensorRT 10 writes where a type and a layout share one field: "Row major linear FP16 format".
WORDS = {name.lower(): kind for name, kind in TYPES.items()} | {
    "fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "e4m3": "fp8", "float16": "fp16", "float32": "fp32",
}  # fmt: skip
# Kinds of layers that multiply, in both libraries' spelling, and names of kernels of other kinds that do.
KINDS = re.compile(r"gemm|correlation|conv|matrixmultiply|matmul|fully|runtime_fusion|mha")
KERNELS = re.compile(r"gemm|mha|Fc(?=_|$)")
FIX = "use the tested version of the library (constraints.txt)"


def multiplied(row: PlanRow) -> str | None:
    """Returns the type that a layer multiplies in, None for one that multiplies nothing."""
    if not KINDS.search(row.kind) and not KERNELS.search(row.name):
        return None
    return multiplied_as(row)


_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: (?P<inputs>.*?), Constants: (?P<constants>.*?), "
    r"Outputs: (?P<outputs>.*?), TacticName: .*?, StreamId: .*?Metadata: ?(?P<nodes>.*)$"
)
_TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: \[([^\]]*)\].*?Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=\x1f|\[|$)")  # TensorRT-RTX 1.7 writes a unit separator between them


def read_log(lines: Sequence[str]) -> list[PlanRow]:
    """Reads the compiled layers out of a verbose build log; a constant that layers share counts in the first."""
    text = "\n".join(lines)
    start = text.rfind("Layers:\n")
    if start < 0:
        raise UserError("the builder's log has no list of layers, so nobody can tell what the engine runs", fix=FIX)
    rows, counted = [], set[str]()
    for line in text[start + len("Layers:\n") :].splitlines():
        if not line.startswith("Name: "):
            break
        rows.append(_logged(line, counted))
    return rows


def _logged(line: str, counted: set[str]) -> PlanRow:
    match = _LAYER.match(line)
    if match is None:
        raise UserError(f"a layer of the plan cannot be read: {line[:200]}", fix=FIX)
    parts = {part: _TENSOR.findall(match[part]) for part in ("inputs", "constants", "outputs")}
    tensors = {part: [(name, _dims(dims), _type(kind)) for name, dims, kind in found] for part, found in parts.items()}
    return _row(match["name"], match["kind"], tensors, match["nodes"], counted)


def read_inspector(text: str) -> list[PlanRow]:
    """Reads an engine inspector's JSON, as TensorRT 10 and 11 write it at detailed verbosity.

    Source: NVIDIA, "Migrating IEngineInspector Usage from TensorRT 10.x to 11.x": 11 splits `Format/Datatype`. Neither
    was read from an engine so far: that takes a GPU.
    """
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"no engine inspector's JSON ({error!r})", fix=FIX) from error
    if any(isinstance(layer, str) for layer in layers):
        raise UserError(
            "the engine names its layers and nothing of them", fix="build it with profiling_verbosity DETAILED"
        )
    counted = set[str]()
    return [_inspected(layer, counted) for layer in layers]


def _inspected(layer: Mapping[str, Any], counted: set[str]) -> PlanRow:
    tensors = {
        part: [(one.get("Name", ""), tuple(one.get("Dimensions", ())), _stated(one)) for one in layer.get(key, ())]
        for part, key in (("inputs", "Inputs"), ("constants", "Constants"), ("outputs", "Outputs"))
    }
    for key in ("Weights", "Bias"):  # of a convolution: no tensors of its own, a type and a count
        if isinstance(held := layer.get(key), Mapping) and held.get("Count"):
            tensors["constants"].append((f"{layer['Name']}/{key}", (held["Count"],), _type(held["Type"])))
    return _row(layer["Name"], layer.get("LayerType", ""), tensors, layer.get("Metadata", ""), counted)


def _row(
    name: str,
    kind: str,
    tensors: Mapping[str, Sequence[tuple[str, tuple[int, ...], str]]],
    nodes: str,
    counted: set[str],
) -> PlanRow:
    fresh = [one for one in tensors["constants"] if one[0] not in counted]
    counted.update(one[0] for one in fresh)
    return PlanRow(
        name=name,
        kind=kind.lower(),
        input_types=tuple(kind for _, _, kind in tensors["inputs"]),
        constant_types=tuple(kind for _, _, kind in tensors["constants"]),
        constant_bytes=sum(tensor_bytes(dims, kind) for _, dims, kind in fresh),
        output_types=tuple(kind for _, _, kind in tensors["outputs"]),
        onnx_nodes=tuple(dict.fromkeys(_outermost(node) for node in _NODE.findall(nodes))),
    )


def _outermost(node: str) -> str:
    """Returns the graph's own node: one inside a function's body is listed as `Add | path/Op (Op)`."""
    _, inside, call = node.rpartition(" | ")
    return call.rpartition(" (")[0] if inside else node


def _type(name: str) -> str:
    if name not in TYPES:
        raise UserError(f"the plan names a type {name!r} that is not known", fix=FIX)
    return TYPES[name]


def _stated(tensor: Mapping[str, Any]) -> str:
    """Returns the type of an inspector's tensor, which 11 states by itself and 10 within its layout."""
    alone = tensor.get("Datatype", tensor.get("DataType"))
    if alone is not None:
        return _type(alone)
    told = str(tensor.get("Format/Datatype", ""))
    found = [WORDS[word] for word in re.findall(r"\w+", told.lower()) if word in WORDS]
    if not found:
        raise UserError(
            f"the plan says {told!r} where the type of tensor {tensor.get('Name')!r} stands",
            fix="inspect an execution context whose input shapes are set: an engine alone knows none",
        )
    return found[0]


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(d) for d in text.split(",") if d.strip())
