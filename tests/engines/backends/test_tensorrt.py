"""TensorRT plans: layers read out of a verbose log, into one vocabulary; targets that lack a format are refused."""

from __future__ import annotations

import pytest

from engines import backends
from engines.backends import _tensorrt
from engines.errors import UserError

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
    (row, empty) = _tensorrt.read_plan(["before", "Layers:\n" + GEMM + "\n" + EMPTY + "\n\nI/O Tensors:\n", "after"])
    assert (row.name, row.kind) == ("a/MatMul_myl0_2", "gemm")
    assert (row.input_types, row.constant_types, row.output_types) == (("fp8",), ("fp8", "fp32"), ("fp16",))
    assert row.constant_bytes == 256 * 192 + 4
    assert row.onnx_nodes == ("a/MatMul", "a/DequantizeLinear")
    assert empty.constant_bytes == 0


def test_a_constant_that_two_layers_share_counts_once():
    rows = _tensorrt.read_plan(["Layers:\n" + GEMM + "\n" + GEMM])
    assert [row.constant_bytes for row in rows] == [256 * 192 + 4, 0]


@pytest.mark.parametrize(
    "lines", [["nothing"], ["Layers:\nName: half a line"], ["Layers:\n" + GEMM.replace("FP8", "FP3")]]
)
def test_a_plan_that_cannot_be_read_is_an_error_not_an_empty_plan(lines):
    with pytest.raises(UserError, match=r"constraints\.txt"):
        _tensorrt.read_plan(lines)


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
    with pytest.raises(UserError, match=f"'second' is {kind}.*{gpu}"):
        backend.check(layers, gpu)


def test_an_unknown_target_lists_close_ones():
    with pytest.raises(UserError, match="sm89"):
        backends.load("trt-rtx").resolve_gpu("sm88")
