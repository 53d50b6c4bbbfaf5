"""The main road with the shipped model: sizes, types, plans, numbers and images of every shipped recipe."""

from __future__ import annotations

import json
import math
import shutil
from functools import cache

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from common import RECIPES
from safetensors.torch import load_file

from engines.build import build
from engines.plans import constant_bytes
from exporter import quantized
from exporter.checks import FLOOR_MARGIN_DB, FP32_AGREEMENT_DB
from exporter.images import IMAGES
from exporter.layers import compare_layers
from exporter.run_folder import Run
from exporter.validate import lowering_rows, open_runners, validate

STORED = {"fp8": "FLOAT8E4M3FN", "int8": "INT8", "int4": "INT4"}
SIZE_LIMIT = {"fp8": 0.60, "int8": 0.60, "int4": 0.42}
COUNT = {"fp8": IMAGES, "int8": 64, "int4": 64}  # images: one recipe's as many as `run` judges, the others' fewer
PSNR_FLOOR_DB = {"fp8": 38.0, "int8": 40.0, "int4": 27.0}


@pytest.fixture(scope="module")
def run_of(quantized_of, graph_of, engine_of):
    def get(name):
        graphs = {dtype: graph_of(name, dtype) for dtype in ("fp32", "fp16")}
        return Run(quantized_of(name), graphs, {b: engine_of(name, b) for b in ("ort", "trt-rtx")})

    return get


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_linear_layer_of_every_block_is_quantized(recipe, quantized_of, checkpoint):
    model = checkpoint.skeleton()
    linear = {
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and path.startswith("transformer_blocks.")
    }
    assert len(linear) == 54
    assert quantized_of(recipe).info["layers"].keys() == linear


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_lie_in_the_file_in_their_quantized_type(recipe, graph_of, quantized_of):
    model = ir.load(graph_of(recipe, "fp16").file("model.onnx"))
    kinds = {path: spec.weight.onnx_type for path, spec in quantized.specs(quantized_of(recipe)).items()}
    found = {
        name.removesuffix(".weight_codes"): value.dtype.name
        for name, value in model.graph.initializers.items()
        if name.endswith(".weight_codes")
    }
    assert found == kinds
    assert STORED[recipe] in kinds.values()


@pytest.mark.parametrize("recipe", RECIPES)
def test_initializers_are_a_fraction_of_the_fp16_recipes(recipe, graph_of):
    ratio = graph_of(recipe, "fp16").info["weight_bytes"] / graph_of("fp16", "fp16").info["weight_bytes"]
    assert ratio <= SIZE_LIMIT[recipe]


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_codes_in_the_file_equal_those_of_the_pytorch_model_bit_for_bit(recipe, dtype, graph_of, quantized_of):
    model = quantized.load(quantized_of(recipe))
    graph = ir.load(graph_of(recipe, dtype).file("model.onnx")).graph
    for path, layer in quantized.quantized_layers(model).items():
        stored = graph.initializers[f"{path}.weight_codes"].const_value.numpy()
        ours = layer.weight_codes
        if stored.dtype == ml_dtypes.float8_e4m3fn:
            stored, ours = stored.view(np.uint8), ours.view(torch.uint8)
        np.testing.assert_array_equal(stored.astype(np.int16), ours.numpy().astype(np.int16), err_msg=path)


@pytest.mark.parametrize("recipe", ["fp8", "int8"])
def test_the_plan_shows_the_recipes_type_on_every_matmul_it_quantizes(recipe, plan_of, quantized_of):
    rows = plan_of(recipe, "trt-rtx")
    for path in quantized_of(recipe).info["layers"]:
        (row,) = [r for r in rows if r.kind == "gemm" and any(n.startswith(f"{path}/MatMul") for n in r.onnx_nodes)]
        assert recipe in row.input_types, (path, row.input_types)
        assert recipe in row.constant_types, (path, row.constant_types)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("backend", ["ort", "trt-rtx"])
def test_the_plans_constants_sum_to_the_files(recipe, backend, plan_of, graph_of, engine_of):
    in_file = graph_of(recipe, engine_of(recipe, backend).info["dtype"]).info["weight_bytes"]
    assert constant_bytes(plan_of(recipe, backend)) == pytest.approx(in_file, rel=0.03)


def test_ort_runs_int8_matmuls_as_integers(plan_of):
    integer = [row for row in plan_of("int8", "ort") if row.kind == "matmulintegertofloat"]
    assert len(integer) == 54
    assert {row.input_types[0] for row in integer} <= {"int8", "uint8"}  # uint8 where the CPU has no VNNI


@pytest.mark.parametrize("backend", ["ort", "trt-rtx"])
def test_two_builds_have_the_same_bytes(backend, engine_of, graph_of, tmp_path):
    first = engine_of("fp8", backend)
    second = build(graph_of("fp8", first.info["dtype"]), backend, tmp_path / "again", gpu="sm89")
    assert second.manifest["files"] == first.manifest["files"]
    assert second.digest == first.digest


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_layer_agrees_with_pytorch_on_the_same_inputs(recipe, run_of):
    run = run_of(recipe)
    rows = compare_layers(Run(run.quantized, {"fp32": run.graphs["fp32"]}, {}))
    assert len(rows) == 54
    for row in rows:
        assert row["sqnr_db"] is None or row["sqnr_db"] >= 60, row
        assert row["codes_different"] is None or row["codes_different"] <= 1e-4, row
    assert any(row["codes"] for row in rows) == (recipe != "int4")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_network_agrees_with_pytorch_to_its_rounding_floor_at_every_recorded_step(recipe, run_of):
    run = run_of(recipe)
    reference = load_file(run.quantized.file(quantized.REFERENCE))
    runners, refusals = open_runners(run)
    rows = lowering_rows(runners["ort"], run.engines["ort"], reference)
    assert [row["step"] for row in rows] == [0, 6, 12, 18, 24]
    for row in rows:
        # int4 keeps activations in float: nothing rounds to codes, and only orders of summation differ (validate.py)
        limit = FP32_AGREEMENT_DB if recipe == "int4" else math.inf
        assert row["sqnr_db"] >= min(row["floor_db"] - FLOOR_MARGIN_DB, limit), row
    assert "trt-rtx" in runners or "GPU" in refusals["trt-rtx"]


@pytest.fixture(scope="module")
def report_of(run_of, checkpoint, artifacts_folder):
    """Returns the report of a recipe, made when first asked for."""
    return cache(lambda name: validate(checkpoint, run_of(name), artifacts_folder / name, count=COUNT[name]))


@pytest.mark.parametrize("recipe", RECIPES)
def test_images_stay_close_to_the_float_models(recipe, report_of, artifacts_folder):
    report = report_of(recipe)
    images = report["accuracy"]["images"]
    assert images["n"] == COUNT[recipe]
    assert images["psnr_db"]["mean"] >= PSNR_FLOOR_DB[recipe]
    assert abs(images["task_score"]["float"] - images["task_score"]["quantized"]) <= 0.01
    assert report["passed"], [check for check in report["checks"] if not check["passed"]]
    assert (artifacts_folder / recipe / "samples.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(report, allow_nan=False)


def test_a_report_follows_the_error_at_every_step(report_of, checkpoint):
    report = report_of("int8")
    for runner in ("quantized", "ort"):
        rows = [row for row in report["accuracy"]["trajectory"] if row["runner"] == runner]
        assert [row["step"] for row in rows] == list(range(25))
        assert all(row["sqnr_db"] is None or math.isfinite(row["sqnr_db"]) for row in rows)
    assert {row["timestep"] for row in report["accuracy"]["per_step"]} <= set(checkpoint_timesteps(checkpoint))


def checkpoint_timesteps(checkpoint):
    from exporter.sampling import timesteps

    return timesteps(checkpoint)


def test_a_damaged_engine_is_caught_by_validation(run_of, artifacts_folder, tmp_path):
    """The same comparison must fail when one layer's scales are wrong by a tenth: a check that cannot fail is none."""
    run = run_of("int8")
    folder = tmp_path / "ort"
    shutil.copytree(run.engines["ort"].path, folder)
    model = onnx.load(folder / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.name == "transformer_blocks.2.ff.net.2.weight_scale":
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 1.1, tensor.name))
    onnx.save(model, folder / "model.onnx")
    from engines.backends import ort

    damaged = ort.OrtRunner(ort.open_session(folder / "model.onnx", run.engines["ort"].info["graph"]))
    rows = lowering_rows(damaged, run.engines["ort"], load_file(run.quantized.file(quantized.REFERENCE)))
    assert any(row["sqnr_db"] < row["floor_db"] - FLOOR_MARGIN_DB for row in rows)
