"""Native kernels: what PyTorch's reference, the portable body and the library compute is one thing, for every packing.

Tolerance: all sum fp32 products in orders of their own, which moves a sum of n by about √n · 2^-24 of its terms; an
fp16 number, what the issue of rounding is measured in here, resolves 2^-11, hundreds of times as much.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from bench_codebook_kernel import layer_graph, random_weight
from common import ROOT

from engines.backends import _codebooks
from exporter.formats.codebook import Format
from exporter.ops import codebook

FP16 = 2.0**-11
FORMATS = {
    "2 bits": Format(4, 256), "3 bits": Format(2, 64), "4 bits": Format(1, 16), "2 bits of nibbles": Format(2, 16),
    "8 bits": Format(1, 256), "vectors of 3": Format(3, 256), "of 5, six bits": Format(5, 64), "of 16": Format(16, 256),
}  # fmt: skip
every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=list(FORMATS))
SIZES = [(1, 2), (37, 26), (300, 130)]  # outputs and sub-vectors: no multiple of a tile, a panel or a part
ROWS = (0, 1, 2, 3, 16, 17, 70)  # empty, the few-rows path, under and over a panel of either width


def fused(model, tmp_path):
    """Returns the graph as an engine holds it."""
    path = tmp_path / "gather.onnx"
    onnx.save(model, path)
    made = _codebooks.rewrite(path, "run")
    assert [node.op_type for node in made.graph.node] == ["CodebookMatMul"]
    return made


def session(model, library=None, threads=2):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    if library:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def assert_same(found, wanted):
    assert found.shape == wanted.shape
    if wanted.size:
        assert np.abs(found - wanted).max() <= FP16 * np.abs(wanted).max() / 16  # far inside fp16's own rounding


@every_format
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reference_body_and_kernel_agree(fmt, scaled, size, library, tmp_path):
    outputs, count = size
    inputs = count * fmt.vector_size
    codes, table, _ = random_weight(outputs, inputs, fmt)
    scale = np.random.default_rng(1).random(outputs, np.float32) + 0.5 if scaled else None
    decoded = layer_graph(codes, table, scale)
    one = fused(decoded, tmp_path)
    runners = [
        session(decoded),
        session(one),
        session(decoded, library),
        session(one, library),
        session(one, library, 1),
    ]
    stored, words = (torch.from_numpy(onnx.numpy_helper.to_array(t).astype(np.float32)) for t in (codes, table))
    weight = codebook.reference(stored, words).double().numpy() * (1.0 if scale is None else scale[:, None])
    for rows in ROWS:
        x = np.random.default_rng(rows).standard_normal((rows, inputs), np.float32)
        for runner in runners:
            assert_same(runner.run(None, {"x": x})[0], x @ weight.T)


@pytest.mark.parametrize("fmt", [Format(4, 256), Format(2, 64)], ids=["2 bits", "3 bits"])
def test_inputs_of_any_rank_keep_their_shape(fmt, library, tmp_path):
    codes, table, weight = random_weight(24, 64, fmt)
    runner = session(fused(layer_graph(codes, table, rank=3), tmp_path), library)
    for shape in ((2, 5, 64), (1, 1, 64), (0, 5, 64)):
        x = np.random.default_rng(0).standard_normal(shape, np.float32)
        assert_same(runner.run(None, {"x": x})[0], x @ weight.numpy().T)


@pytest.mark.parametrize("simd", ["avx2", "none"])
def test_every_instruction_set_computes_the_same(simd, library, tmp_path):
    """Each in a process of its own: the kernels are chosen once."""
    codes, table, weight = random_weight(37, 104, Format(4, 256))
    onnx.save(fused(layer_graph(codes, table), tmp_path), tmp_path / "model.onnx")
    x = np.random.default_rng(0).standard_normal((19, 104), np.float32)
    np.save(tmp_path / "x.npy", x)
    script = (
        "import sys, numpy, onnxruntime; o = onnxruntime.SessionOptions(); o.register_custom_ops_library(sys.argv[2]); "
        "s = onnxruntime.InferenceSession(sys.argv[1] + '/model.onnx', o, providers=['CPUExecutionProvider']); "
        "x = numpy.load(sys.argv[1] + '/x.npy'); "
        "numpy.save(sys.argv[1] + '/y.npy', numpy.concatenate([s.run(None, {'x': p})[0] for p in (x[:1], x[1:])]))"
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(library)]
    subprocess.run(command, check=True, env=os.environ | {"EXPORT_ENGINE_SIMD": simd}, cwd=ROOT)
    assert_same(np.load(tmp_path / "y.npy"), x @ weight.numpy().T)


def test_a_convolutions_weight_is_decoded_bit_for_bit(library):
    """Weights that no matmul reads are decoded by a kernel too: a lookup rounds nothing."""
    for fmt in FORMATS.values():
        codes, table, weight = random_weight(37, 26 * fmt.vector_size, fmt)
        decoded = layer_graph(codes, table)
        decoded.graph.node[-1].CopyFrom(onnx.helper.make_node("Identity", ["weight_0"], ["y_0"]))
        (found,) = session(decoded, library).run(None, {"x": np.zeros((1, 1), np.float32)})
        np.testing.assert_array_equal(found, weight.numpy())


def broken(fmt, change):
    codes, table, _ = random_weight(8, 8 * fmt.vector_size, fmt)
    values = onnx.numpy_helper.to_array(table)
    if change == "code beyond":
        return codes, onnx.numpy_helper.from_array(values[: len(values) // 4], "codebook")
    if change == "too many words":
        return codes, onnx.numpy_helper.from_array(np.concatenate([values, values]), "codebook")
    del codes.dims[1:]
    codes.dims.extend([2, 3] if fmt.bits == 6 else [4])  # fewer inputs than x has
    codes.raw_data = codes.raw_data[: len(codes.raw_data) // 2]
    return codes, table


@pytest.mark.parametrize("fmt", [Format(4, 256), Format(2, 64), Format(2, 16)], ids=["bytes", "6 bits", "nibbles"])
@pytest.mark.parametrize(
    ("change", "named"),
    [("code beyond", "names word .* of a codebook of"), ("too many words", "words of .* numbers for codes of")],
)
def test_codes_beyond_the_codebook_are_refused_when_a_session_opens(fmt, change, named, library):
    with pytest.raises(Exception, match=f"0/CodebookDequantizeLinear: .*{named}"):
        session(layer_graph(*broken(fmt, change)), library)


@pytest.mark.parametrize("fmt", [Format(4, 256), Format(2, 64), Format(2, 16)], ids=["bytes", "6 bits", "nibbles"])
def test_an_input_of_another_width_is_refused_with_both(fmt, library, tmp_path):
    runner = session(fused(layer_graph(*broken(fmt, "narrow")), tmp_path), library)
    width = 4 * fmt.vector_size
    with pytest.raises(Exception, match=rf"0/MatMul: an input \[3, {width + 1}\] .* 8 outputs and {width} inputs"):
        runner.run(None, {"x": np.zeros((3, width + 1), np.float32)})
