"""Layer by layer: each quantized layer's own ONNX nodes against its PyTorch module, on the same recorded inputs.

So are attentions whose products are quantized: their points by their codes, their products by what comes out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir as ir
import torch
from safetensors.torch import load_file
from torch import nn

from engines import schedule
from engines.artifacts import Artifact, Json
from engines.backends import ort
from exporter import progress, quantized, step_table, steps
from exporter.attention import Products, QuantizedPoint, quantized_products
from exporter.metrics import finite, sqnr_db
from exporter.modules import QuantizedLayer
from exporter.ops import codebook
from exporter.quantize import reference_feeds, reference_steps
from exporter.run_folder import Run
from exporter.runners import TorchRunner

Record = tuple[tuple[Any, ...], torch.Tensor]  # what a module was called with, and the step of every row of the feed
ROWS = 8  # of each reference feed
GROUP = 16  # layers whose inputs are held at once: bounds the memory
POINTS_READ = ("query", "key", "value", "mask")  # what `Products` is called with


def compare_layers(run: Run) -> list[Json]:
    """Returns per graph and layer the SQNR of its output and the share of activation codes that differ.

    A row of an attention's products counts the codes of its four points.
    """
    reference = {name: value[:ROWS] for name, value in load_file(run.quantized.file(quantized.REFERENCE)).items()}
    model, family = quantized.load(run.quantized), quantized.family(run.quantized)
    runner = TorchRunner("quantized", model, family)
    found: dict[str, nn.Module] = {**quantized.quantized_layers(model), **quantized_products(model)}
    layers = list(found.items())
    groups = [dict(layers[i : i + GROUP]) for i in range(0, len(layers), GROUP)]
    graphs = {dtype: LayerGraphs(graph) for dtype, graph in run.graphs.items()}
    rows: list[Json] = []
    for group in progress.track(groups, len(groups), f"comparing layers ({GROUP} at a time)"):
        points = {
            f"{p}.{n}": m
            for p, layer in group.items()
            if isinstance(layer, Products)
            for n, m in layer.named_children()
        }
        inputs = record_inputs(group | points, runner, reference)
        for dtype, graph in graphs.items():
            for path, layer in group.items():
                row = (
                    compare_products(graph, path, layer, inputs)
                    if isinstance(layer, Products)
                    else compare_layer(graph, path, cast(QuantizedLayer, layer), inputs[path])
                )
                rows.append({"dtype": dtype, **row})
    return rows


def record_inputs(
    layers: Mapping[str, nn.Module], runner: TorchRunner, reference: Mapping[str, torch.Tensor]
) -> dict[str, list[Record]]:
    """Returns what some modules are called with over the reference steps, and the step of every row."""
    inputs: dict[str, list[Record]] = {}
    step = torch.empty(0)

    def hook(path: str) -> Any:
        return lambda _module, args: inputs.setdefault(path, []).append((args, step))

    handles = [layer.register_forward_pre_hook(hook(path)) for path, layer in layers.items()]
    try:
        for number in reference_steps(reference):
            feeds = reference_feeds(reference, number)
            step = feeds["step"]
            runner.run_tensors(feeds)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def compare_layer(graph: LayerGraphs, path: str, layer: QuantizedLayer, inputs: Sequence[Record]) -> Json:
    """Runs one layer's nodes in ONNX Runtime and its module in PyTorch."""
    run_output = ort.OrtRunner(ort.open_session(graph.cut(path, codes=False), graph.info))
    ours, theirs = [], []
    for (x,), step in inputs:
        with torch.no_grad(), steps.at(steps.Position(step)):
            ours.append(layer(x).flatten())
        theirs.append(torch.from_numpy(run_output.run({"x": x.numpy(), **graph.columns(path, step)})["y"]).flatten())
    different, total = compare_codes(graph, path, layer, inputs) if layer.spec.activation else (0, 0)
    return _row(path, ours, theirs, different, total)


def compare_products(graph: LayerGraphs, path: str, products: Products, inputs: Mapping[str, Sequence[Record]]) -> Json:
    """Runs one attention's products in ONNX Runtime and in PyTorch, then the quantizers of its points."""
    model, read = graph.cut_products(path)
    run_output = ort.OrtRunner(ort.open_session(model, graph.info))
    ours, theirs = [], []
    for args, step in inputs[path]:
        with torch.no_grad(), steps.at(steps.Position(step)):
            ours.append(products(*args).flatten())
        given = dict(zip(POINTS_READ, args, strict=False))
        given["key"] = given["key"].transpose(-1, -2)  # as its point sees it
        feeds = {name: (given[name].permute(order) if order else given[name]).numpy() for name, order in read.items()}
        theirs.append(torch.from_numpy(run_output.run(feeds | graph.columns(path, step))["y"]).flatten())
    counts = [
        compare_codes(graph, f"{path}.{name}", cast(QuantizedPoint, point), inputs[f"{path}.{name}"])
        for name, point in products.named_children()
    ]
    return _row(path, ours, theirs, sum(different for different, _ in counts), sum(total for _, total in counts))


def compare_codes(
    graph: LayerGraphs, path: str, module: QuantizedLayer | QuantizedPoint, inputs: Sequence[Record]
) -> tuple[int, int]:
    """Returns how many of a quantizer's codes differ between ONNX Runtime and PyTorch, and how many there are."""
    dtype = np.float16 if graph.info["dtype"] == "fp16" else np.float32
    session = ort.open_session(graph.cut(path, codes=True), graph.info)
    different, total = 0, 0
    for (x,), step in inputs:
        with torch.no_grad(), steps.at(steps.Position(step)):
            expected = module.input_codes(x).view(torch.uint8).numpy().ravel()
        feeds = {"x": x.numpy().astype(dtype), **graph.columns(path, step)}
        wanted = [entry.name for entry in session.get_inputs()]
        (codes,) = session.run_with_ort_values(None, {name: _ort_value(feeds[name]) for name in wanted})
        different += int((_bytes(codes) != expected).sum())
        total += expected.size
    return different, total


def _row(path: str, ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], different: int, total: int) -> Json:
    expected, found = torch.cat(list(ours)), torch.cat(list(theirs))
    bad = int((~found.isfinite()).sum() + (~expected.isfinite()).sum())
    return {
        "layer": path,
        "sqnr_db": finite(sqnr_db(expected, found)),
        "not_finite": bad,
        "codes_different": different / total if total else None,
        "codes": total,
    }


class LayerGraphs:
    """Cuts single layers out of a graph, which is read once."""

    def __init__(self, graph: Artifact) -> None:
        self.info = graph.info
        self._table = np.load(graph.file(schedule.FILE), allow_pickle=False) if graph.info["step_input"] else None
        self._model = ir.load(graph.file("model.onnx"))
        self._nodes: dict[str, list[ir.Node]] = {}
        for node in self._model.graph:
            self._nodes.setdefault((node.name or "").rpartition("/")[0], []).append(node)

    def cut(self, path: str, *, codes: bool) -> bytes:
        """Returns one layer as a model: x → y, or with `codes` x → its activation's codes.

        What it reads of the step table comes in as `column_0` and so on, [rows, 1].
        """
        nodes = self._nodes_of(path)
        if codes:
            nodes = _up_to_codes(nodes)
        entries = _read_by(nodes)
        columns = {value: f"column_{i}" for value, i in _columns(entries).items()}
        rest = entries - columns.keys()
        if len(rest) != 1:
            raise AssertionError(f"{path}: its nodes read {len(rest)} tensors where a layer reads one")
        (entry,) = rest
        return _cut(self._model, nodes, {entry: "x"} | columns, self.info["dtype"], path, codes=codes)

    def cut_products(self, path: str) -> tuple[bytes, dict[str, list[int]]]:
        """Returns one attention's products as a model, and which of POINTS_READ it reads, in which order of axes.

        One Transpose may turn the keys and bring their heads forward, so that they come in otherwise.
        """
        nodes = self._nodes_of(path)
        own = [node for node in nodes if (node.name or "").rpartition("/")[0] == path]
        nodes = _up_to(next(node for node in reversed(own) if node.op_type in ("MatMul", "Mul")), nodes)
        entries = _read_by(nodes)
        names = {value: f"column_{i}" for value, i in _columns(entries).items()}
        roles = {value: self._role(value, path) for value in entries - names.keys()}
        named = names | {value: role for value, (role, _) in roles.items()}
        return _cut(self._model, nodes, named, self.info["dtype"], path, codes=False), dict(roles.values())

    def _role(self, value: ir.Value, path: str) -> tuple[str, list[int]]:
        """Returns what an attention's products read a value as, by who reads it, and its axes' order if not that."""
        for node in value.consumers():
            owner = (node.name or "").rpartition("/")[0]
            if owner in {f"{path}.{name}" for name in POINTS_READ}:
                return owner.rpartition(".")[2], []
            if owner == path and node.op_type == "Transpose":
                order = list(node.attributes["perm"].as_ints())
                return "key", [order.index(axis) for axis in range(len(order))]
        return "mask", []

    def _nodes_of(self, path: str) -> list[ir.Node]:
        """Returns a module's nodes, and those that it shares with other readers of the same tensor."""
        found = [
            n for owner, nodes in self._nodes.items() if owner == path or owner.startswith(f"{path}.") for n in nodes
        ]
        queue = list(found)
        while queue:
            for value in queue.pop().inputs:
                node = value.producer() if value is not None else None
                if node is not None and node not in found and self._comes_before_codes(node):
                    found.append(node)
                    queue.append(node)
        order = {node: i for i, node in enumerate(self._model.graph)}
        return sorted(found, key=order.__getitem__)

    def _comes_before_codes(self, node: ir.Node) -> bool:
        """Whether a node works for a layer's quantizer: what a layer gives comes after it."""
        owner = (node.name or "").rpartition("/")[0]
        own = self._nodes.get(owner, []) if owner in self.info["layers"] | self.info["points"] else []
        quantizers = [i for i, n in enumerate(own) if n.op_type == "QuantizeLinear" and not _is_decoded(n.inputs[0])]
        return bool(quantizers) and own.index(node) < quantizers[0]

    def columns(self, path: str, step: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
        """Returns what one layer reads of the step table for rows at `step`."""
        numbers = _columns(_read_by(self._nodes_of(path))).values()
        assert self._table is not None or not numbers
        return {f"column_{i}": self._table[step.numpy()][:, i : i + 1] for i in numbers}  # type: ignore[index]


def _read_by(nodes: Sequence[ir.Node]) -> set[ir.Value]:
    """Returns what nodes read that neither they nor the graph's constants hold."""
    made = {value for node in nodes for value in node.outputs}
    return {v for n in nodes for v in n.inputs if v is not None and v not in made and not v.is_initializer()}


def _columns(values: set[ir.Value]) -> dict[ir.Value, int]:
    """Returns those that are columns of the step table, which no module's node splits, and their numbers."""
    found = {}
    for value in values:
        node, index = value.producer(), value.index()
        if node is not None and index is not None and node.op_type == "Split" and _is_row(node.inputs[0]):
            found[value] = index
    return found


def _is_row(value: ir.Value | None) -> bool:
    """Whether a value is the step table's row: gathered by the step, or the graph's input."""
    assert value is not None
    node = value.producer()
    return (
        value.name == schedule.ROW
        if node is None
        else any(one is not None and one.name == step_table.NAME for one in node.inputs)
    )


def _up_to_codes(nodes: Sequence[ir.Node]) -> list[ir.Node]:
    """Returns the node that quantizes what a layer reads, and those that it needs."""
    return _up_to(next(n for n in nodes if n.op_type == "QuantizeLinear" and not _is_decoded(n.inputs[0])), nodes)


def _up_to(last: ir.Node, nodes: Sequence[ir.Node]) -> list[ir.Node]:
    """Returns a node and those that it needs: a module may hold arithmetic of shapes besides."""
    wanted, found = {last}, []
    for node in reversed(nodes[: nodes.index(last) + 1]):
        if node in wanted:
            found.append(node)
            wanted |= {p for v in node.inputs if v is not None and (p := v.producer()) is not None}
    return found[::-1]


def _is_decoded(value: ir.Value | None) -> bool:
    """Whether a value is looked up in a codebook: a weight, which is quantized too beside FP8 and INT8 activations."""
    node = value.producer() if value is not None else None
    return node is not None and node.op_type == codebook.NAME


def _cut(
    model: ir.Model, nodes: Sequence[ir.Node], entries: Mapping[ir.Value, str], dtype: str, path: str, *, codes: bool
) -> bytes:
    protos = [ir.to_proto(node) for node in nodes]
    exit_ = nodes[-1].outputs[0]
    weights = {v.name: v.const_value for n in nodes for v in n.inputs if v is not None and v.is_initializer()}
    names = {value.name: name for value, name in entries.items()}
    for proto in protos:
        proto.input[:] = [names.get(name, name) for name in proto.input]
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
        [
            onnx.helper.make_tensor_value_info(
                name, onnx.TensorProto.FLOAT if name.startswith("column") else float_type, None
            )
            for name in entries.values()
        ],
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
    """Prints the ranking, and the worst of the comparison of each graph with PyTorch, as tables on stdout."""
    from rich.table import Column, Table

    from exporter import damage

    console = progress.stdout()
    console.print(damage.table(found, most))
    for dtype in dict.fromkeys(row["dtype"] for row in found["graphs"]):
        rows = [row for row in found["graphs"] if row["dtype"] == dtype]
        rows.sort(key=_goodness)
        table = Table(Column("layer", overflow="fold"), "SQNR dB", "activation codes different")
        table.title = f"each layer's nodes in the {dtype} graph against PyTorch: the worst {min(most, len(rows))}"
        table.title += f" of {len(rows)}"
        for row in rows[:most]:
            value = "NaN" if row["not_finite"] else "equal" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}"
            share = "–" if row["codes_different"] is None else f"{row['codes_different']:.1e} of {row['codes']:,}"
            table.add_row(row["layer"], value, share)
        console.print(table)


def _goodness(row: Json) -> float:
    """Returns what rows are ranked by: NaN first, equality last."""
    if row["not_finite"]:
        return -math.inf
    return math.inf if row["sqnr_db"] is None else float(row["sqnr_db"])


def _ort_value(array: np.ndarray[Any, Any]) -> Any:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _bytes(value: Any) -> np.ndarray[Any, Any]:
    return np.asarray(value.numpy()).view(np.uint8).ravel()
