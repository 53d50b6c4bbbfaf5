"""The main road for a small random model of any family: what the family tests share."""

from __future__ import annotations

import json

import torch
from common import FAMILIES
from families import feeds_of
from safetensors.torch import load_file
from torch import nn

from engines.build import build
from engines.plans import read_plan
from exporter import quantized, recipe
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.checks import FLOOR_MARGIN_DB, under
from exporter.layers import compare_layers
from exporter.lower import lower
from exporter.metrics import finite, sqnr_db
from exporter.quantize import quantize
from exporter.run_folder import Run
from exporter.runners import TorchRunner
from exporter.validate import lowering_rows, open_runners, per_step_rows

LAYER_KINDS = ("gemm", "correlation")  # TensorRT's names for matmuls and convolutions


SMALLER = {"sdxl": {"transformer_layers_per_block": [1, 1]}}  # the second layer of a block is like the first


def calibrated(name, folder):
    """Returns a family's small random model and its calibration."""
    (folder / "config.json").write_text(json.dumps(FAMILIES[name] | SMALLER.get(name, {})))
    checkpoint = open_checkpoint(f"random:{folder}", steps=2)
    return checkpoint, calibrate(checkpoint, folder / "calibration", samples=2)


def untrained(name):
    """Returns a shipped recipe of DilateQuant without its minutes of training."""
    source = json.loads(json.dumps(recipe.load(name).source))
    source["calibration"] = {"samples": 8}
    source["rule"][-1]["method"] = {"name": "dilatequant", "iterations": 0, "output": False}
    return recipe.parse(name, source)


def assert_goes_the_whole_road(checkpoint, calibration, recipe_name, tmp_path):
    """Quantizes, lowers, builds for both backends; the engine that runs here agrees, the other's plan is as asked."""
    source = quantize(checkpoint, recipe.load(recipe_name), calibration, tmp_path / "quantized")
    specs = quantized.specs(source)
    assert {spec.weight.kind for spec in specs.values()} == {recipe_name}
    graph = lower(source, tmp_path / "graph" / "fp32", dtype="fp32")
    run = Run(source, {"fp32": graph}, {"ort": build(graph, "ort", tmp_path / "engines" / "ort")})
    runner = open_runners(run)[0]["ort"]
    rounds = any(spec.activation for spec in specs.values())
    assert_recorded_feeds_agree(runner, run, rounds)
    assert_other_sizes_agree(runner, run, checkpoint, rounds)
    if rounds:
        assert_layers_agree(run)

    half = lower(source, tmp_path / "graph" / "fp16", dtype="fp16")
    rows = read_plan(build(half, "trt-rtx", tmp_path / "engines" / "trt-rtx", gpu="sm89"))
    for path, spec in specs.items():
        assert_runs_as_asked(rows, path, spec)


def assert_agrees(row, quantization_db, *, rounds):
    """Asserts an engine's agreement with the quantized PyTorch model.

    Where no activation is rounded, as `validate` asks. Where codes are, two or three rows are too few for a floor: one
    flipped code flips a hundredth of those behind it in a network of random weights, and two runs without a common
    rounding differ by the errors of both, 3 dB below one's. Layers are then compared one by one.
    """
    assert row["not_finite"] == 0, row
    if rounds:
        assert row["sqnr_db"] is None or row["sqnr_db"] >= quantization_db - 3, (row, quantization_db)
    else:
        assert under(row, quantization_db) <= FLOOR_MARGIN_DB, (row, quantization_db)


def assert_recorded_feeds_agree(runner, run, rounds):
    reference = load_file(run.quantized.file(quantized.REFERENCE))
    pytorch = TorchRunner("quantized", quantized.load(run.quantized), quantized.family(run.quantized))
    quantization = {row["step"]: row["sqnr_db"] for row in per_step_rows(pytorch, reference, run)}
    rows = lowering_rows(runner, run.engines["ort"], reference)
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert_agrees(row, quantization[row["step"]], rounds=rounds)


def assert_layers_agree(run):
    """Each layer's own nodes, on the inputs that PyTorch's layer has, give what PyTorch's layer gives."""
    rows = compare_layers(Run(run.quantized, run.graphs, {}))
    products = {path.rpartition(".")[0] for path in run.quantized.info["points"]}
    assert {row["layer"] for row in rows} == run.quantized.info["layers"].keys() | products
    for row in rows:
        assert row["sqnr_db"] is None or row["sqnr_db"] >= 60, row
        assert row["codes_different"] <= 1e-4, row


def assert_other_sizes_agree(runner, run, checkpoint, rounds):
    """The same at the least size of every dynamic axis, with three rows: the graph was traced at another."""
    found = checkpoint.family
    sizes = {name: axis.min for name, axis in found.axes().items()} | {"batch": 3}
    feeds = feeds_of(found, sizes) | {"step": torch.arange(3) % 2}
    fed = run.graphs["fp32"].info["fed_timesteps"]
    if fed:  # an engine checks that its steps are those of its timesteps
        feeds["timestep"] = torch.tensor([fed[step] for step in feeds["step"]]).to(feeds["timestep"].dtype)
    model = quantized.load(run.quantized)
    outputs = {}
    for name, dtype in (("quantized", torch.float32), ("quantized_fp64", torch.float64)):
        nn.Module.to(model, dtype)
        (outputs[name],) = TorchRunner(name, model, found, dtype=dtype).run_tensors(feeds).values()
    (wanted,) = TorchRunner("float", checkpoint.load(), found).run_tensors(feeds).values()
    (output,) = runner.run({name: value.numpy() for name, value in feeds.items()}).values()
    assert output.shape == tuple(wanted.shape)
    row = {
        "dtype": "fp32",
        "sqnr_db": finite(sqnr_db(outputs["quantized"], torch.from_numpy(output))),
        "floor_db": finite(sqnr_db(outputs["quantized_fp64"], outputs["quantized"])),
        "not_finite": int((~torch.from_numpy(output).isfinite()).sum()),
    }
    assert_agrees(row, sqnr_db(wanted, outputs["quantized"]), rounds=rounds)


def assert_runs_as_asked(rows, path, spec):
    """A layer's weight lies in the engine in its own type; where activations are quantized, its kernel takes both."""
    mine = [row for row in rows if any(node.startswith(f"{path}/") for node in row.onnx_nodes)]
    # Matmuls that read the same input may run as one, their weights joined in one kernel named after one of them.
    joined = {node for row in mine if row.kind in LAYER_KINDS for node in row.onnx_nodes}
    mine += [row for row in rows if row not in mine and joined & set(row.onnx_nodes)]
    assert any(spec.weight.kind in row.constant_types for row in mine), (path, mine)
    if spec.activation:
        names = (f"{path}/MatMul", f"{path}/Conv")
        found = [row for row in mine if any(node.startswith(names) for node in row.onnx_nodes)]
        kernels = [row for row in found if row.kind in LAYER_KINDS]
        assert len(kernels) == 1, (path, mine)
        assert spec.activation.kind in kernels[0].input_types, (path, kernels)
        assert spec.weight.kind in kernels[0].constant_types, (path, kernels)


def assert_multiplies_in_int8(rows, stepped, points):
    """Every layer at the paths `stepped`, and every product of the attentions of `points`, is an INT8 kernel."""
    for attention in {path.rpartition(".products.")[0] for path in points}:
        mine = [
            row
            for row in rows
            if row.kind == "gemm" and any(n.startswith(f"{attention}.products/MatMul") for n in row.onnx_nodes)
        ]
        assert [row.input_types[:2] for row in mine] == [("int8", "int8")] * 2, (attention, mine)
    for path in stepped:
        mine = [
            row
            for row in rows
            if row.kind in LAYER_KINDS and any(n.startswith((f"{path}/MatMul", f"{path}/Conv")) for n in row.onnx_nodes)
        ]
        assert mine, path
        assert all("int8" in row.input_types for row in mine), (path, mine)
