"""ONNX Runtime's engines hold what their graphs hold."""

from __future__ import annotations

import pytest

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
