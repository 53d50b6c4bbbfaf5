"""The graph file: names, interface, pinned versions, external data, dynamic batch, and what cannot be lowered."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

from engines.backends import ort
from exporter import lower as stage
from exporter import recipe as recipes
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.quantize import quantize


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return open_checkpoint(str(tiny_folder), steps=2)


@pytest.fixture(scope="module")
def tiny_calibration(tiny, tmp_path_factory):
    return calibrate(tiny, tmp_path_factory.mktemp("lower") / "calibration", samples=1)


@pytest.fixture(scope="module")
def make(tiny, tiny_calibration, tmp_path_factory):
    def quantized(weight, activation=None, layers="transformer_blocks.1.ff.*"):
        rule = {"layers": layers, "weight": weight} | ({"activation": activation} if activation else {})
        source = {"rule": [rule, {"layers": "*", "keep": "float"}]}
        folder = tmp_path_factory.mktemp("quantized")
        return quantize(tiny, recipes.parse("test", source), tiny_calibration, folder / "quantized")

    return quantized


@pytest.fixture(scope="module")
def conv_and_linear(make, tmp_path_factory):
    """Block INT4 on Linear layers and on the patch convolution (4 inputs per output: blocks of 2)."""
    weight = {"format": "int", "bits": 4, "granularity": "block", "block_size": 2}
    source = make(weight, layers="*p*")
    return source, stage.lower(source, tmp_path_factory.mktemp("lowered") / "graph", dtype="fp32")


def test_interface_and_versions_are_pinned(conv_and_linear):
    model = onnx.load(conv_and_linear[1].file("model.onnx"))
    assert [entry.name for entry in model.graph.input] == ["hidden_states", "timestep", "class_labels"]
    assert [entry.name for entry in model.graph.output] == ["sample"]
    assert (model.ir_version, [o.version for o in model.opset_import if not o.domain]) == (10, [21])
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_nodes_are_named_after_module_paths_and_unique(conv_and_linear):
    model = onnx.load(conv_and_linear[1].file("model.onnx"))
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert "transformer_blocks.1.ff.net.2/MatMul" in names
    assert "pos_embed.proj/Conv" in names


def test_exporter_metadata_is_stripped(conv_and_linear):
    model = onnx.load(conv_and_linear[1].file("model.onnx"))
    initializers = {tensor.name for tensor in model.graph.initializer}
    assert {value.name for value in model.graph.value_info} <= initializers
    assert not model.metadata_props
    described = (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output)
    assert not any(thing.metadata_props or thing.doc_string for thing in described)


def test_no_two_initializers_are_identical_but_zero_points(conv_and_linear):
    model = onnx.load(conv_and_linear[1].file("model.onnx"))
    seen = [
        (tuple(i.dims), i.data_type, i.raw_data)
        for i in model.graph.initializer
        if not i.name.endswith("weight_zero_point")
    ]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_any_batch_agrees_with_pytorch(batch, conv_and_linear, tiny):
    from exporter import quantized
    from exporter.runners import TorchRunner

    source, graph = conv_and_linear
    rng = np.random.default_rng(batch)
    feeds = {
        "hidden_states": rng.standard_normal((batch, 1, 8, 8)).astype(np.float32),
        "timestep": rng.integers(0, 1000, batch),
        "class_labels": rng.integers(0, 11, batch),
    }
    ours = TorchRunner("quantized", quantized.load(source), tiny.family).run(feeds)["sample"]
    theirs = ort.OrtRunner(ort.open_session(graph.file("model.onnx"), graph.info)).run(feeds)["sample"]
    # Weight-only: the same fp32 sums in another order, over at most 256 terms of magnitude 1.
    np.testing.assert_allclose(theirs, ours, atol=2e-5)


def test_a_convolution_in_blocks_is_stored_as_int4(conv_and_linear):
    model = onnx.load(conv_and_linear[1].file("model.onnx"))
    codes = {i.name: i for i in model.graph.initializer}["pos_embed.proj.weight_codes"]
    assert codes.data_type == onnx.TensorProto.INT4
    assert len(codes.raw_data) == 32 * 4 // 2


def test_large_weights_go_beside_the_graph_and_are_hashed(make, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "EXTERNAL_BYTES", 1000)
    source = make({"format": "int", "bits": 8})
    graph = stage.lower(source, tmp_path / "graph")
    assert {"model.onnx", "model.onnx.data"} <= set(graph.manifest["files"])
    assert graph.file("model.onnx").stat().st_size < graph.file("model.onnx.data").stat().st_size
    session = ort.open_session(graph.file("model.onnx"), graph.info)
    assert [entry.name for entry in session.get_outputs()] == ["sample"]


def test_the_check_catches_weights_that_were_expanded(make, tmp_path):
    """Planted fault: one layer's INT8 codes stored as fp32 must not pass."""
    from exporter import quantized
    from exporter.lower.check import check_graph

    source = make({"format": "int", "bits": 8})
    graph = stage.lower(source, tmp_path / "graph")
    model = onnx.load(graph.file("model.onnx"))
    for tensor in model.graph.initializer:
        if tensor.name == "transformer_blocks.1.ff.net.2.weight_codes":
            codes = onnx.numpy_helper.to_array(tensor).astype(np.int32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(codes, tensor.name))
    del model.graph.value_info[:]
    for node in model.graph.node:  # an int32 zero point, so that the graph stays valid ONNX
        if node.name == "transformer_blocks.1.ff.net.2/DequantizeLinear" and len(node.input) == 3:
            del node.input[2]
    onnx.save(model, tmp_path / "expanded.onnx")
    specs = quantized.specs(source)
    shapes = {path: layer.weight_shape for path, layer in quantized.quantized_layers(quantized.load(source)).items()}
    with pytest.raises(AssertionError, match="its format promises"):
        check_graph(tmp_path / "expanded.onnx", specs, shapes)


def test_the_manifest_tells_an_application_what_to_feed(conv_and_linear):
    info = json.loads(json.dumps(conv_and_linear[1].info))
    assert info["inputs"][0] == {"name": "hidden_states", "dtype": "fp32", "shape": ["batch", 1, 8, 8]}
    assert info["output"] == "sample"
    assert len(info["timesteps"]) == 2
