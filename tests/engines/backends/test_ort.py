"""ONNX Runtime's engines hold what their graphs hold."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from engines.backends import ort
from engines.build import build
from engines.plans import read_plan
from exporter import recipe
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.lower import lower
from exporter.quantize import quantize


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_beside_float_activations_take_no_more_than_in_the_graph(bits, tiny_folder, tmp_path):
    """Its matmul of quantized weights has scales by blocks: made of one per channel, they must not add up."""
    checkpoint = open_checkpoint(str(tiny_folder), steps=2)
    calibration = calibrate(checkpoint, tmp_path / "calibration", samples=1)
    rules = [{"layers": "*.emb.timestep_embedder.*", "weight": {"format": "int", "bits": bits}}]
    asked = recipe.parse("test", {"rule": [*rules, {"layers": "*", "keep": "float"}]})
    graph = lower(quantize(checkpoint, asked, calibration, tmp_path / "quantized"), tmp_path / "graph")
    rows = [row for row in read_plan(build(graph, "ort", tmp_path / "engine")) if row.kind == "matmulnbits"]
    assert len(rows) == 4
    for row in rows:
        (module,) = {node.rpartition("/")[0] for node in row.onnx_nodes}
        assert row.constant_bytes <= graph.info["module_bytes"][module] * 1.03, row


@pytest.mark.parametrize("granularity", ["tensor", "step"])
def test_int4_weights_beside_int8_inputs_are_multiplied_in_int8(granularity, tiny_folder, tmp_path):
    """INT4 in the file, INT8 in memory, the numbers of the graph: it has no matmul of the two."""
    checkpoint = open_checkpoint(str(tiny_folder), steps=2)
    calibration = calibrate(checkpoint, tmp_path / "calibration", samples=1)
    activation = {"format": "int", "bits": 8, "granularity": granularity}
    rule = {"layers": "*", "scope": "blocks", "weight": {"format": "int", "bits": 4}, "activation": activation}
    kept = {"layers": "*", "scope": "outside_blocks", "keep": "float"}
    source = quantize(checkpoint, recipe.parse("w4a8", {"rule": [kept, rule]}), calibration, tmp_path / "quantized")
    graph = lower(source, tmp_path / "graph")
    engine = build(graph, "ort", tmp_path / "engine")
    kinds = {node: row.kind for row in read_plan(engine) for node in row.onnx_nodes}
    assert {kinds[f"{path}/MatMul"] for path in graph.info["layers"]} == {"matmulintegertofloat"}
    stored = onnx.load(engine.file("model.onnx")).graph.initializer
    assert sum(one.data_type == onnx.TensorProto.INT4 for one in stored) == len(graph.info["layers"])
    codes = sum(np.prod(one.dims) for one in stored if one.data_type == onnx.TensorProto.INT4)
    assert engine.info["weight_bytes"] == graph.info["weight_bytes"]
    assert engine.info["resident_weight_bytes"] - graph.info["weight_bytes"] == pytest.approx(codes / 2, rel=0.1)

    rng = np.random.default_rng(0)
    shape = (2, *checkpoint.family.latent_shape())
    feeds = {"hidden_states": rng.standard_normal(shape).astype(np.float32), "step": np.array([1, 0])}
    feeds |= {"timestep": np.array([900, 100]), "class_labels": np.array([1, 2])}
    ours, theirs = (
        ort.OrtRunner(ort.open_session(one.file("model.onnx"), graph.info)).run(feeds) for one in (engine, graph)
    )
    # whole numbers summed as such, or as floats that hold them exactly: what differs is one rounding of the scales
    np.testing.assert_allclose(ours["sample"], theirs["sample"], rtol=1e-4, atol=1e-5)
