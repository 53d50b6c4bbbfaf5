"""ONNX Runtime's engines hold what their graphs hold."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engines.artifacts import Artifact
from engines.backends import ort
from engines.build import build
from engines.errors import UserError
from engines.pipeline import plain_record
from engines.plans import read_plan
from exporter import recipe
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.layers import compare_layers
from exporter.lower import lower
from exporter.quantize import quantize
from exporter.run_folder import Run


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


@pytest.mark.parametrize("saturating", [False, True], ids=["", "as on a CPU without VNNI"])
@pytest.mark.parametrize("granularity", ["tensor", "step"])
def test_int4_weights_beside_int8_inputs_are_multiplied_in_int8(
    granularity, saturating, tiny_folder, tmp_path, monkeypatch
):
    """INT4 in the file, INT8 in memory, the numbers of the graph: it has no matmul of the two."""
    monkeypatch.setattr(ort, "sums_saturate", lambda: saturating)  # here; the build's process asks its own
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
    as_built = Artifact(engine.path, engine.manifest | {"info": graph.info})
    for row in compare_layers(Run(source, {"fp32": as_built}, {})):
        assert row["codes_different"] <= 1e-4, row
        assert row["sqnr_db"] is None or row["sqnr_db"] >= 100, row


@pytest.mark.parametrize(
    ("machine", "flags", "saturates"),
    [("x86_64", "avx2 fma", True), ("AMD64", "avx2 avx_vnni", False), ("x86_64", "avx512_vnni avx2", False)],
)
def test_slower_kernels_are_asked_for_where_the_fastest_would_saturate(machine, flags, saturates, monkeypatch):
    ort.sums_saturate.cache_clear()
    monkeypatch.setattr(ort.platform, "machine", lambda: machine)
    monkeypatch.setattr(ort.Path, "read_text", lambda *_, **__: f"model name : x\nflags\t\t: {flags}\nbugs : none\n")
    assert ort.sums_saturate() == saturates
    options = ort.session_options({"layers": {}, "points": {}})
    if saturates:
        assert options.get_session_config_entry("session.x64quantprecision") == "1"
    else:
        with pytest.raises(Exception, match="x64quantprecision"):
            options.get_session_config_entry("session.x64quantprecision")
    ort.sums_saturate.cache_clear()


def test_int8_sums_are_exact_on_this_machine(tmp_path):
    """Codes at the ends of their types, whose products two by two pass 16 bits."""
    ones = {"x": np.full((2, 64), 127.0, np.float32)}
    constants = {"w": np.full((64, 3), 127, np.int8), "s": np.float32(1), "z": np.int8(0), "ws": np.ones(3, np.float32)}
    constants["wz"] = np.zeros(3, np.int8)
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        onnx.helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=1),
        onnx.helper.make_node("MatMul", ["d", "wd"], ["y"]),
    ]
    float_type = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "layer",
        [onnx.helper.make_tensor_value_info("x", float_type, ["rows", 64])],
        [onnx.helper.make_tensor_value_info("y", float_type, ["rows", 3])],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 21)])
    info = {"layers": {"l": {"weight": "int8", "activation": "int8"}}, "points": {}, "dtype": "fp32"}
    session = ort.open_session(model.SerializeToString(), info)
    (output,) = session.run(None, ones)
    assert (output == 64 * 127 * 127).all()


def test_a_value_out_of_the_models_range_is_told_in_one_line(capfd):
    labels = helper.make_tensor_value_info("labels", TensorProto.INT64, ["batch"])
    output = helper.make_tensor_value_info("row", TensorProto.FLOAT, ["batch"])
    table = helper.make_tensor("table", TensorProto.FLOAT, [10], list(range(10)))
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "labels"], ["row"])], "g", [labels], [output], [table]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    runner = ort.OrtRunner(ort.open_session(model.SerializeToString(), plain_record("fp32")))
    assert runner.run({"labels": np.array([9])})["row"].tolist() == [9]
    for call in (runner.run, runner.run_dlpack):
        with pytest.raises(UserError, match=r"on what was fed: .*out of data bounds") as caught:
            call({"labels": np.array([11])})
        assert "\n" not in caught.value.what
        assert "check the values fed" in caught.value.fix
    assert capfd.readouterr().err == ""


class TestOnAGpu:
    """What is asked of ONNX Runtime where there is a GPU; no test runs on one."""

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch):
        monkeypatch.setattr(ort, "device", lambda: "cuda")

    def test_fp32_is_not_tf32_and_cuda_is_loaded_first(self, monkeypatch):
        asked = []
        monkeypatch.setattr(ort, "_load_cuda", lambda: asked.append("loaded"))
        monkeypatch.setattr(
            "onnxruntime.InferenceSession",
            lambda *_, providers, **__: asked.append(providers) or SimpleNamespace(get_providers=lambda: ["none"]),
        )
        with pytest.raises(UserError, match="did not get CUDAExecutionProvider"):
            ort.open_session(b"", {"layers": {}, "points": {}, "dtype": "fp32"})
        assert asked == ["loaded", [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]]

    @pytest.mark.parametrize(
        ("asked", "got", "excused"),
        [
            (("int8", "int8"), ("int8", "fp32"), True),
            (("int4", "int8"), ("int8", "fp32"), True),
            (("int8", "int8"), ("fp32", "fp32"), False),  # the weight takes four times its memory
            (("int8", "int8"), ("int8", "fp16"), True),
        ],
    )
    def test_what_is_multiplied_in_float_there_is_said(self, asked, got, excused):
        pairs = (dict(zip(("weight", "activation"), one, strict=True)) for one in (asked, got))
        reason = ort.explain("matmul", *pairs, {"device": "cuda"})
        assert (reason is not None) == excused
        assert not excused or "CUDA" in reason
