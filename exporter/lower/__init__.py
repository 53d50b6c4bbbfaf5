"""Stage `lower`: quantized model → ONNX graph with Q/DQ nodes, weights in their quantized types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines import artifacts, schedule
from engines.artifacts import Artifact, Json, Request
from engines.errors import UserError, unknown
from engines.memory import peak_rss_bytes
from exporter.versions import versions

if TYPE_CHECKING:
    import onnx_ir as ir

    from exporter.models import Family, TensorSpec
    from exporter.quantized import Tensors
    from exporter.specs import LayerSpec
    from exporter.step_table import StepTable

DTYPES = ("fp16", "fp32")
STEP_INPUTS = ("index", "row")
EXTERNAL_BYTES = 256 << 20  # weights beyond this go beside the graph: protobuf ends at 2 GB, and loaders read it whole


def lower(source: Artifact, out: Path, *, dtype: str = "fp32", step_input: str = "index") -> Artifact:
    """Lowers a quantized model to a graph whose float type is `dtype`.

    Where activations have a scale for every step, the graph is told the `step` of every row, or with `step_input`
    "row" what the table holds for it, `step_row`.
    """
    check_dtype(dtype)
    if step_input not in STEP_INPUTS:
        raise unknown("step input", step_input, STEP_INPUTS)
    stepped = [*source.info["layers"].values(), *source.info["points"].values()]
    if step_input == "row" and not any(one["steps"] for one in stepped):
        raise UserError(f"{source.path}: has no scales by step, so no row of them is fed", fix="leave out --step-input")
    check_deployable(source.info["layers"], str(source.path))
    _check_range(source, dtype)
    libraries = versions("torch", "diffusers", "onnx", "onnx-ir", "onnxscript")
    request = Request("graph", {"quantized": source.digest}, {"dtype": dtype, "step_input": step_input}, libraries)
    if (made := artifacts.current(out, request)) is not None:
        return made
    import numpy as np

    from engines.backends.ort import link_or_copy
    from exporter import quantized
    from exporter.lower.check import check_graph
    from exporter.lower.trace import inputs_of, trace
    from exporter.step_table import step_table

    specs, table = quantized.specs(source), step_table(source)
    family, stored = quantized.family(source), quantized.StoredTensors(source)
    inputs = inputs_of(family, table, step_input)
    with artifacts.drafting(out, request) as draft:
        graph = run_passes(trace(source, dtype, table, step_input), family, stored, specs, inputs, table)
        write(graph, draft.path / "model.onnx")
        shapes = {
            path: layer.weight_shape for path, layer in quantized.quantized_layers(quantized.skeleton(source)).items()
        }
        found = check_graph(draft.path / "model.onnx", specs, shapes)
        link_or_copy(source.file(quantized.REFERENCE), draft.path / quantized.REFERENCE)
        if table is not None:
            np.save(draft.path / schedule.FILE, table.values.numpy())
        draft.info = _info(source, dtype, inputs) | found
        draft.info["step_input"] = step_input if table is not None else None
        draft.info["fed_timesteps"] = family.fed_timesteps(source.info["timesteps"]) if table is not None else None
        draft.timings["peak_rss_bytes"] = peak_rss_bytes()
    return artifacts.open_artifact(out, "graph")


def check_deployable(layers: Mapping[str, Any], where: str) -> None:
    """Raises a UserError if some layer is simulated; `layers` is what a Quantized artifact's manifest says of them."""
    simulated = [path for path, layer in layers.items() if not layer["deployable"]]
    if simulated:
        raise UserError(
            f"{where}: {len(simulated)} layers are simulated (deployable = false), {simulated[0]!r} the first: "
            "no graph holds them",
            fix="study them in PyTorch, or drop deployable = false from the recipe and quantize again",
        )


def _check_range(source: Artifact, dtype: str) -> None:
    """Raises a UserError if the model overflows in a graph's float type, which was seen when it was quantized."""
    if dtype == "fp16" and (found := source.info["fp16_overflow"]):
        raise UserError(
            f"{source.path}: in fp16 layer {found['layer']!r} overflows at step {found['step']}: {found['values']} NaN "
            "or infinite values come out of the model",
            fix="lower it with --dtype fp32",
        )


def check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)


def run_passes(
    model: ir.Model,
    family: Family,
    stored: Tensors,
    specs: Mapping[str, LayerSpec],
    inputs: Sequence[TensorSpec],
    table: StepTable | None,
) -> ir.Model:
    """Makes of what was traced the graph that is written."""
    import onnx_ir as ir
    from onnx_ir.passes import common

    from exporter.lower.passes.attach_functions import AttachFunctions
    from exporter.lower.passes.attach_weights import AttachWeights
    from exporter.lower.passes.attach_zero_points import AttachZeroPoints
    from exporter.lower.passes.fold_constants import FoldConstants
    from exporter.lower.passes.name_after_modules import NameAfterModules
    from exporter.lower.passes.share_initializers import ShareInitializers
    from exporter.lower.trace import PREFIX

    passes = ir.passes.Sequential(
        FoldConstants(),
        NameAfterModules(PREFIX, inputs, [family.output()]),
        common.RemoveUnusedNodesPass(),
        AttachWeights(stored, specs, table),
        ShareInitializers(),
        AttachZeroPoints(),
        AttachFunctions(),
        common.ClearMetadataAndDocStringPass(),
    )
    return passes(model).model


def write(model: ir.Model, path: Path) -> None:
    """Writes the graph, its weights one at a time; large ones go beside it, in `<name>.data`."""
    import onnx_ir as ir

    for node in model.graph:
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                value.metadata_props.clear()
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None  # the exporter's own may be wrong: facts.md section 3
    total = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    ir.save(model, path, external_data=f"{path.name}.data" if total > EXTERNAL_BYTES else None)


def _info(source: Artifact, dtype: str, inputs: Sequence[TensorSpec]) -> Json:
    from exporter import quantized
    from exporter.lower.trace import IR_VERSION, OPSET

    family, info = quantized.family(source), source.info
    return {
        "dtype": dtype,
        "opset": OPSET,
        "ir_version": IR_VERSION,
        "inputs": input_entries(inputs, dtype),
        "output": family.output().name,
        "axes": {name: axis.to_json() for name, axis in family.axes().items()},
        "layers": {path: spec.engine_types for path, spec in quantized.specs(source).items()},
        "points": {path: spec.engine_type for path, spec in quantized.points(source).items()},
        "stored_bytes": quantized.stored_bytes(source),
        **{key: info[key] for key in ("model", "recipe", "weights", "timesteps", "sampler", "splits", "allowed")},
    }


def input_entries(inputs: Sequence[TensorSpec], dtype: str) -> list[Json]:
    """Returns what a graph's manifest says of its inputs."""
    return [
        {"name": spec.name, "dtype": dtype if spec.dtype == "float" else spec.dtype, "shape": list(spec.shape)}
        for spec in inputs
    ]
