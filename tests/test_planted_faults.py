"""Faults that are planted, of every kind that a run is to catch: each is caught, and the layer is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tampering import folded, remade, scaled, without_quantizer

from engines import backends
from engines.audit import AS_ASKED, EXPLAINED, OTHER, audit, rows_of
from engines.build import build
from engines.errors import UserError
from engines.options import Options
from engines.plans import read_plan
from exporter import quantized, recipe, taps
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.checks import checks
from exporter.lower import lower
from exporter.quantize import quantize
from exporter.run_folder import Run, open_run
from exporter.runners import TorchRunner
from exporter.validate import origins_of

LAYER = "transformer_blocks.1.ff.net.0.proj"
ATTENTION = {"layers": "*attn1*", "keep": "float"}
REST = {"layers": "*", "scope": "outside_blocks", "keep": "float"}
FORMATS = {
    "int8": {"weight": {"format": "int", "bits": 8}, "activation": {"format": "int", "bits": 8}},
    "fp8": {
        kind: {"format": "fp", "exponent_bits": 4, "mantissa_bits": 3} for kind in ("weight", "activation")
    },
    "codebook": {
        "weight": {"format": "codebook", "vector_size": 1, "codebook_size": 16}, "method": {"name": "kmeans"}
    },
}  # fmt: skip


def recipe_of(kind):
    rules = [REST, ATTENTION, {"layers": "*", **FORMATS[kind]}]
    return recipe.parse(kind, {"calibration": {"samples": 2}, "rule": rules})


@pytest.fixture(scope="module")
def run_of(tiny_folder, tmp_path_factory):
    """Returns a run of the tiny model in one of the formats, by ONNX Runtime alone."""
    checkpoint = open_checkpoint(str(tiny_folder), steps=3)
    folder = tmp_path_factory.mktemp("planted")
    data = calibrate(checkpoint, folder / "calibration", samples=2)
    made = {}

    def get(kind):
        if kind not in made:
            source = quantize(checkpoint, recipe_of(kind), data, folder / kind / "quantized")
            graph = lower(source, folder / kind / "graph" / "fp32")
            engine = build(graph, "ort", folder / kind / "engines" / "ort")
            made[kind] = Run(source, {"fp32": graph}, {"ort": engine})
        return made[kind]

    return get


def outputs_of(run):
    model, reference = quantized.load(run.quantized), load_file(run.quantized.file(quantized.REFERENCE))
    layers = [path for path, one in model.named_modules() if path in run.graphs["fp32"].info["stored_bytes"]]
    layers = [path for path in layers if hasattr(model.get_submodule(path), "bias")]
    runner = TorchRunner("quantized", model, quantized.family(run.quantized))
    return taps.record(runner, model, layers, reference), reference


@pytest.mark.parametrize(("kind", "status"), [("int8", AS_ASKED), ("fp8", EXPLAINED)])
def test_a_layer_whose_quantizer_is_gone_is_named_by_the_audit(kind, status, run_of, tmp_path):
    run = run_of(kind)
    assert {row.status for row in audit(run.engines["ort"]) if row.layer == LAYER} == {status}
    broken = build(remade(run.graphs["fp32"], tmp_path / "graph", without_quantizer(LAYER)), "ort", tmp_path / "ort")
    rows = audit(broken)
    assert [(row.layer, row.reason) for row in rows if row.status == OTHER] == [
        (LAYER, "nothing quantizes what it multiplies")
    ]
    engine = {"backend": "ort", "audit": [row.to_json() for row in rows], "weight_bytes": 1, "graph_weight_bytes": 1}
    psnr = {"mean": 40.0, "ci95": [39.0, 41.0], "noise_floor": 12.0}
    images = {"runner": "ort", "not_finite": 0, "psnr_db": psnr, "task_score": None}
    accuracy = {"per_step": [], "lowering": [], "origins": [], "trajectory": [], "images": images}
    (failed,) = [one for one in checks({"engines": [engine], "accuracy": accuracy}) if not one["passed"]]
    assert LAYER in failed["detail"]
    assert "ort" in failed["name"]


def test_a_scale_halved_in_one_layer_is_where_the_error_starts(run_of, tmp_path):
    run = run_of("int8")
    outputs, reference = outputs_of(run)
    assert origins_of(run, "ort", outputs, reference) == []
    halved = remade(run.engines["ort"], tmp_path / "ort", scaled(f"{LAYER}.weight_scale", np.float32(0.5)))
    found = origins_of(Run(run.quantized, run.graphs, {"ort": halved}), "ort", outputs, reference)
    assert [(one["layer"], one["step"]) for one in found] == [(LAYER, 0), (LAYER, 1), (LAYER, 2)]
    assert all(one["sqnr_db"] < 10 for one in found)  # the half of what it should be: 6 dB, but for the bias


def test_nan_in_one_layer_of_an_engine_is_counted_and_named(run_of, tmp_path):
    run = run_of("int8")
    outputs, reference = outputs_of(run)
    broken = remade(run.engines["ort"], tmp_path / "ort", scaled(f"{LAYER}.weight_scale", np.float32(np.nan)))
    found = origins_of(Run(run.quantized, run.graphs, {"ort": broken}), "ort", outputs, reference)
    assert found[0]["layer"] == LAYER
    assert found[0]["not_finite"] > 0


def test_a_codebook_folded_to_a_dense_weight_is_refused_with_its_layer(run_of, tmp_path):
    run = run_of("codebook")
    weight = quantized.quantized_layers(quantized.load(run.quantized))[LAYER].weight_tensor.dequantize()
    dense = remade(run.graphs["fp32"], tmp_path / "graph", folded(LAYER, weight.numpy()))
    engine = build(dense, "ort", tmp_path / "ort", options=Options(decode="load"))
    found = rows_of(read_plan(engine), engine.info["graph"], backends.load("ort"))  # as if nobody had asked for that
    (row,) = [row for row in found if row.layer == LAYER]
    assert (row.status, row.asked["weight"], row.got["weight"]) == (OTHER, "int4", "fp32")
    with pytest.raises(UserError, match=f"expanded, most of all '{LAYER}'"):
        build(dense, "ort", tmp_path / "checked")
    asked = audit(build(run.graphs["fp32"], "ort", tmp_path / "load", options=Options(decode="load")))
    assert {row.reason for row in asked if row.status != AS_ASKED} == {"decoded when opened, by --decode load"}
    assert not [row for row in asked if row.status == OTHER]


def test_fp16_overflow_in_one_layer_is_named_with_its_step(tiny_folder, tmp_path):
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (weights,) = tmp_path.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["transformer_blocks.0.attn1.to_v.weight"] *= 1e6
    tensors["transformer_blocks.0.attn1.to_out.0.weight"] *= 1e-6
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights)
    checkpoint = open_checkpoint(str(tmp_path), steps=3)
    data = calibrate(checkpoint, tmp_path / "calibration", samples=2)
    source = quantize(checkpoint, recipe_of("int8"), data, tmp_path / "quantized")
    assert source.info["fp16_overflow"]["layer"] == "transformer_blocks.0.attn1.to_v"
    with pytest.raises(UserError, match=r"fp16 layer 'transformer_blocks\.0\.attn1\.to_v' overflows at step 0"):
        lower(source, tmp_path / "graph", dtype="fp16")
    assert lower(source, tmp_path / "graph", dtype="fp32").info["dtype"] == "fp32"


def test_nan_in_the_float_model_is_named_with_its_layer(tiny_folder, tmp_path):
    checkpoint = open_checkpoint(str(tiny_folder), steps=3)
    model = checkpoint.load()
    model.get_submodule(LAYER).weight.data[0, 0] = torch.inf
    feeds = {
        "hidden_states": torch.ones(1, 1, 8, 8), "timestep": torch.tensor([9]), "class_labels": torch.tensor([0])
    }  # fmt: skip
    assert TorchRunner("float", model, checkpoint.family).first_not_finite(feeds) == LAYER
    sound = TorchRunner("float", checkpoint.load(), checkpoint.family)
    assert sound.first_not_finite(feeds) is None


def test_an_engine_of_another_graph_is_refused(run_of):
    run = run_of("int8")
    folder = run.quantized.path.parent
    assert open_run(folder)[1].engines["ort"].digest == run.engines["ort"].digest
    graph = run.graphs["fp32"].path
    changed = remade(run.graphs["fp32"], folder / "changed", scaled(f"{LAYER}.weight_scale", np.float32(0.5)))
    kept = graph.rename(folder / "kept")
    changed.path.rename(graph)
    try:
        with pytest.raises(UserError, match="engines/ort: was made from another"):
            open_run(folder)
    finally:
        graph.rename(folder / "changed")
        kept.rename(graph)


def test_a_manifest_says_what_is_multiplied_and_by_what(run_of):
    found = {entry["layer"]: entry for entry in run_of("int8").graphs["fp32"].info["multiplications"]}
    assert found[LAYER]["quantizers"] == [[f"{LAYER}/QuantizeLinear", f"{LAYER}/DequantizeLinear_1"]]
    assert found[LAYER]["decoders"] == [f"{LAYER}/DequantizeLinear"]
    assert found["transformer_blocks.0.attn1"]["op"] == "attention"
    assert len(found["transformer_blocks.0.attn1"]["nodes"]) == 2
    json.dumps(found)
