"""Layer by layer: each quantized layer's own ONNX nodes against its PyTorch module, on the same recorded inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from safetensors.torch import load_file

from engines.artifacts import Artifact, Json
from engines.backends import ort
from exporter import progress, quantized
from exporter.formats import Format
from exporter.metrics import finite, sqnr_db
from exporter.modules import QuantizedLayer
from exporter.quantize import reference_feeds, reference_steps
from exporter.run_folder import Run
from exporter.runners import TorchRunner

ROWS = 8  # of each reference feed
GROUP = 16  # layers whose inputs are held at once: bounds the memory


def compare_layers(run: Run) -> list[Json]:
    """Returns per graph and layer the SQNR of its output and the share of activation codes that differ."""
    reference = {name: value[:ROWS] for name, value in load_file(run.quantized.file(quantized.REFERENCE)).items()}
    model, family = quantized.load(run.quantized), quantized.family(run.quantized)
    runner = TorchRunner("quantized", model, family)
    layers = list(quantized.quantized_layers(model).items())
    groups = [dict(layers[i : i + GROUP]) for i in range(0, len(layers), GROUP)]
    graphs = {dtype: LayerGraphs(graph) for dtype, graph in run.graphs.items()}
    rows: list[Json] = []
    for group in progress.track(groups, len(groups), f"comparing layers ({GROUP} at a time)"):
        inputs = record_inputs(group, runner, reference)
        for dtype, graph in graphs.items():
            rows += [{"dtype": dtype, **compare_layer(graph, p, layer, inputs[p])} for p, layer in group.items()]
    return rows


def record_inputs(
    layers: Mapping[str, QuantizedLayer], runner: TorchRunner, reference: Mapping[str, torch.Tensor]
) -> dict[str, list[torch.Tensor]]:
    """Returns some quantized layers' inputs over the reference steps."""
    inputs: dict[str, list[torch.Tensor]] = {}

    def hook(path: str) -> Any:
        return lambda _module, args: inputs.setdefault(path, []).append(args[0])

    handles = [layer.register_forward_pre_hook(hook(path)) for path, layer in layers.items()]
    try:
        for step in reference_steps(reference):
            runner.run_tensors(reference_feeds(reference, step))
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def compare_layer(graph: LayerGraphs, path: str, layer: QuantizedLayer, inputs: Sequence[torch.Tensor]) -> Json:
    """Runs one layer's nodes in ONNX Runtime and its module in PyTorch."""
    dtype = np.float16 if graph.info["dtype"] == "fp16" else np.float32
    run_output = ort.OrtRunner(ort.open_session(graph.cut(path, codes=False), graph.info))
    fmt = layer.spec.activation
    run_codes = ort.open_session(graph.cut(path, codes=True), graph.info) if fmt else None
    ours, theirs, different, total = [], [], 0, 0
    for x in inputs:
        with torch.no_grad():
            ours.append(layer(x).flatten())
        theirs.append(torch.from_numpy(run_output.run({"x": x.numpy()})["y"]).flatten())
        if run_codes is not None and fmt is not None:
            (codes,) = run_codes.run_with_ort_values(None, {"x": _ort_value(x.numpy().astype(dtype))})
            different += int((_bytes(codes) != expected_codes(layer, fmt, x)).sum())
            total += x.numel()
    share = different / total if total else None
    value = finite(sqnr_db(torch.cat(ours), torch.cat(theirs)))
    return {"layer": path, "sqnr_db": value, "codes_different": share, "codes": total}


def expected_codes(layer: QuantizedLayer, fmt: Format, x: torch.Tensor) -> np.ndarray[Any, Any]:
    if layer.spec.multiplied:
        x = x * layer.input_multiplier
    return fmt.encode(x / layer.activation_scale).view(torch.uint8).numpy().ravel()


class LayerGraphs:
    """Cuts single layers out of a graph, which is read once."""

    def __init__(self, graph: Artifact) -> None:
        self.info = graph.info
        self._model = ir.load(graph.file("model.onnx"))
        self._nodes: dict[str, list[ir.Node]] = {}
        for node in self._model.graph:
            self._nodes.setdefault((node.name or "").rpartition("/")[0], []).append(node)

    def cut(self, path: str, *, codes: bool) -> bytes:
        """Returns one layer as a model: x → y, or with `codes` x → its activation's codes."""
        nodes = self._nodes[path]
        made = {value for node in nodes for value in node.outputs}
        entries = {v for n in nodes for v in n.inputs if v is not None and v not in made and not v.is_initializer()}
        if len(entries) != 1:
            raise AssertionError(f"{path}: its nodes read {len(entries)} tensors where a layer reads one")
        (entry,) = entries
        if codes:
            nodes = _up_to_codes(nodes, entry)
        return _cut(self._model, nodes, entry, nodes[-1].outputs[0], self.info["dtype"], path, codes=codes)


def _up_to_codes(nodes: Sequence[ir.Node], entry: ir.Value) -> list[ir.Node]:
    """Returns the node that quantizes what a layer reads, after the one that multiplies it, if there is one."""
    first = next(node for node in nodes if entry in node.inputs)
    if first.op_type == "QuantizeLinear":
        return [first]
    return [first, next(node for node in nodes if node.op_type == "QuantizeLinear" and node.inputs[0] in first.outputs)]


def _cut(
    model: ir.Model, nodes: Sequence[ir.Node], entry: ir.Value, exit_: ir.Value, dtype: str, path: str, *, codes: bool
) -> bytes:
    protos = [ir.to_proto(node) for node in nodes]
    weights = {v.name: v.const_value for n in nodes for v in n.inputs if v is not None and v.is_initializer()}
    for proto in protos:
        proto.input[:] = ["x" if name == entry.name else name for name in proto.input]
        proto.output[:] = ["y" if name == exit_.name else name for name in proto.output]
    float_type = onnx.TensorProto.FLOAT16 if dtype == "fp16" else onnx.TensorProto.FLOAT
    zero = nodes[-1].inputs[2] if codes else None
    code_type = zero.dtype.value if zero is not None and zero.dtype is not None else float_type
    initializers = [
        ir.to_proto(ir.Tensor(t.numpy(), dtype=t.dtype, name=n)) for n, t in weights.items() if t is not None
    ]
    graph = onnx.helper.make_graph(
        protos,
        path,
        [onnx.helper.make_tensor_value_info("x", float_type, None)],
        [onnx.helper.make_tensor_value_info("y", code_type if codes else float_type, None)],
        initializers,
    )
    made = onnx.helper.make_model(
        graph,
        ir_version=model.ir_version,
        opset_imports=[onnx.helper.make_opsetid(*opset) for opset in model.opset_imports.items()],
        functions=[ir.to_proto(function) for function in model.functions.values()],
    )
    return bytes(made.SerializeToString())


def print_layers(found: Json, most: int = 20) -> None:
    """Prints the ranking, and the worst of the comparison of graphs with PyTorch, as tables on stdout."""
    from rich.table import Column, Table

    from exporter import damage

    rows = sorted(found["graphs"], key=lambda row: math.inf if row["sqnr_db"] is None else row["sqnr_db"])
    table = Table("graph", Column("layer", overflow="fold"), "SQNR dB", "activation codes different")
    table.title = f"each layer's nodes against PyTorch: the worst {min(most, len(rows))} of {len(rows)}"
    for row in rows[:most]:
        value = "equal" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}"
        share = "–" if row["codes_different"] is None else f"{row['codes_different']:.1e} of {row['codes']:,}"
        table.add_row(row["dtype"], row["layer"], value, share)
    console = progress.stdout()
    console.print(damage.table(found, most))
    console.print(table)


def _ort_value(array: np.ndarray[Any, Any]) -> Any:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _bytes(value: Any) -> np.ndarray[Any, Any]:
    return np.asarray(value.numpy()).view(np.uint8).ravel()
