"""TensorRT plans: layers read out of a verbose log, into one vocabulary; targets that lack a format are refused."""

from __future__ import annotations

import json

import pytest

from engines import backends
from engines.backends import _tensorrt_plan
from engines.errors import UserError
from engines.plans import PlanRow

LINEAR = "Strides: [1], StrideOrder: [0], Datatype: {}, Format: (Linear) Row major linear format }}"
GEMM = (
    "Name: a/MatMul_myl0_2, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [-1,256], " + LINEAR.format("FP8") + "], "
    "Constants: [ { Name: w, Dimensions: [256,192], "
    + LINEAR.format("FP8")
    + ", { Name: s, Dimensions: [1], "
    + LINEAR.format("Float")
    + "], Outputs: [ { Name: y, Dimensions: [-1,192], "
    + LINEAR.format("Half")
    + "], TacticName: stub, StreamId: 0, Metadata: [ONNX Layer: a/MatMul]\x1f[ONNX Layer: a/DequantizeLinear]"
)
EMPTY = "Name: b, LayerType: signal, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata: "


def test_a_layers_types_constants_and_nodes_are_read():
    (row, empty) = _tensorrt_plan.read_log(
        ["before", "Layers:\n" + GEMM + "\n" + EMPTY + "\n\nI/O Tensors:\n", "after"]
    )
    assert (row.name, row.kind) == ("a/MatMul_myl0_2", "gemm")
    assert (row.input_types, row.constant_types, row.output_types) == (("fp8",), ("fp8", "fp32"), ("fp16",))
    assert row.constant_bytes == 256 * 192 + 4
    assert row.onnx_nodes == ("a/MatMul", "a/DequantizeLinear")
    assert empty.constant_bytes == 0


def test_a_constant_that_two_layers_share_counts_once():
    rows = _tensorrt_plan.read_log(["Layers:\n" + GEMM + "\n" + GEMM])
    assert [row.constant_bytes for row in rows] == [256 * 192 + 4, 0]


@pytest.mark.parametrize(
    "lines", [["nothing"], ["Layers:\nName: half a line"], ["Layers:\n" + GEMM.replace("FP8", "FP3")]]
)
def test_a_plan_that_cannot_be_read_is_an_error_not_an_empty_plan(lines):
    with pytest.raises(UserError, match=r"constraints\.txt"):
        _tensorrt_plan.read_log(lines)


def tensor(layout, kind, name="x", dims=(-1, 256)):
    """A tensor of an inspector's JSON, in 10's spelling or 11's."""
    layouts = {10: {"Format/Datatype": f"Row major linear {kind} format"}, 11: {"Datatype": kind, "Format": "Linear"}}
    return {"Name": name, "Location": "Device", "Dimensions": list(dims), **layouts[layout]}


def inspected(layout, narrow, wide):
    gemm = {
        "Name": "a/MatMul", "LayerType": "gemm", "Inputs": [tensor(layout, narrow)],
        "Constants": [tensor(layout, narrow, "w", (256, 192))], "Outputs": [tensor(layout, wide, "y", (-1, 192))],
        "Metadata": "[ONNX Layer: a/MatMul]\x1f[ONNX Layer: a/DequantizeLinear]",
    }  # fmt: skip
    conv = {
        "Name": "b/Conv", "LayerType": "CaskConvolution", "Inputs": [tensor(layout, narrow)],
        "Outputs": [tensor(layout, wide)], "Weights": {"Type": "Int8", "Count": 2304},
        "Bias": {"Type": "Float", "Count": 16}, "Metadata": "[ONNX Layer: b/Conv]",
    }  # fmt: skip
    return json.dumps({"Layers": [gemm, conv], "Bindings" if layout == 10 else "I/O Tensors": []})


@pytest.mark.parametrize(
    ("layout", "narrow", "wide"), [(10, "INT8", "FP16"), (10, "Int8", "Half"), (11, "Int8", "Half")]
)
def test_an_inspectors_json_is_read_in_both_layouts(layout, narrow, wide):
    gemm, conv = _tensorrt_plan.read_inspector(inspected(layout, narrow, wide))
    assert (gemm.input_types, gemm.constant_types, gemm.output_types) == (("int8",), ("int8",), ("fp16",))
    assert gemm.constant_bytes == 256 * 192
    assert gemm.onnx_nodes == ("a/MatMul", "a/DequantizeLinear")
    assert (conv.kind, conv.constant_types, conv.constant_bytes) == ("caskconvolution", ("int8", "fp32"), 2304 + 64)
    assert [_tensorrt_plan.multiplied(row) for row in (gemm, conv)] == ["int8", "int8"]


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("nothing", "constraints"),
        ('{"Layers": ["a/MatMul"]}', "DETAILED"),
        (inspected(10, "N/A due to dynamic shapes", "FP16").replace("Row major linear N/", "N/"), "shapes are set"),
        (inspected(11, "FP3", "Half"), "constraints"),
    ],
    ids=["no JSON", "names alone", "no types", "an unknown type"],
)
def test_an_inspectors_json_that_tells_no_types_is_refused(text, fix):
    with pytest.raises(UserError) as raised:
        _tensorrt_plan.read_inspector(text)
    assert fix in raised.value.fix


@pytest.mark.parametrize(
    ("name", "kind", "inputs", "constants", "multiplies"),
    [
        ("a/MatMul_myl0", "gemm", ("fp8",), ("fp8", "fp32"), "fp8"),
        ("a/MatMul_myl0", "gemm", ("int8", "int8"), ("fp32",), "int8"),
        ("__myl_CastMulCastFc_myl0_17", "runtime_fusion", ("fp16",), ("fp16", "int8"), "fp16"),
        ("_gemm_mha_v2_myl0", "kgen", ("fp16", "fp16", "fp16"), (), "fp16"),
        ("__myl_Cast_myl0_22", "kgen", (), ("int4",), None),
        ("__myl_MulAddSilu", "kgen", ("fp16",), ("fp16",), None),
    ],
)
def test_what_a_layer_multiplies_in_is_told_by_its_operands(name, kind, inputs, constants, multiplies):
    row = PlanRow(name, kind, inputs, constants, 0, ("fp16",), ())
    assert _tensorrt_plan.multiplied(row) == multiplies


@pytest.mark.parametrize(
    ("kind", "gpu", "fits"),
    [
        ("fp8", "sm80", False),
        ("fp8", "sm86", False),
        ("fp8", "sm89", True),
        ("int4", "sm75", False),
        ("int4", "sm80", True),
        ("int8", "sm75", True),
        ("fp8_e5m2", "sm120", False),
    ],
)
def test_a_format_the_target_lacks_is_refused_with_the_layer(kind, gpu, fits):
    backend = backends.load("trt-rtx")
    layers = {"first": {"weight": None, "activation": None}, "second": {"weight": kind, "activation": None}}
    if fits:
        assert backend.check(layers, gpu) is None
        return
    with pytest.raises(UserError, match=f"'second' stores its weight in {kind},.*{gpu}"):
        backend.check(layers, gpu)


def test_an_unknown_target_lists_close_ones():
    with pytest.raises(UserError, match="sm89"):
        backends.load("trt-rtx").resolve_gpu("sm88")
