"""Weights that graphs look up: compressed in the file and in the plan, decoded to what PyTorch has, bit for bit."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import onnx
import pytest
import torch
from common import TINY
from safetensors.torch import load_file

from engines.backends import ort
from engines.build import build
from engines.errors import UserError
from engines.plans import read_plan
from exporter import quantized
from exporter import recipe as recipes
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.layers import compare_layers
from exporter.lower import lower
from exporter.metrics import sqnr_db
from exporter.ops import codebook
from exporter.quantize import quantize, reference_feeds
from exporter.run_folder import Run

FP8 = {"format": "fp", "exponent_bits": 4, "mantissa_bits": 3}


def fp(exponent_bits, mantissa_bits, **rest):
    return {"format": "fp", "exponent_bits": exponent_bits, "mantissa_bits": mantissa_bits, **rest}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A tiny random DiT, its patch convolution and feed-forward quantized as asked."""
    folder = tmp_path_factory.mktemp("wide")
    (folder / "config.json").write_text(json.dumps(TINY | {"in_channels": 32, "out_channels": 32, "num_layers": 1}))
    checkpoint = open_checkpoint(f"random:{folder}", steps=2)
    calibration = calibrate(checkpoint, folder / "calibration", samples=1)

    def quantized_with(weight, activation=None, method=None):
        rest = ({"activation": activation} if activation else {}) | ({"method": method} if method else {})
        rules = [{"layers": pattern, "weight": weight} | rest for pattern in ("pos_embed.proj", "*.ff.*")]
        recipe = recipes.parse("test", {"rule": [*rules, {"layers": "*", "keep": "float"}]})
        return quantize(checkpoint, recipe, calibration, tmp_path_factory.mktemp("q") / "quantized")

    return quantized_with


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("weight", "activation"),
    [
        (fp(2, 1), FP8),
        (fp(3, 0), FP8),
        (fp(2, 1, granularity="tensor"), FP8),
        (fp(2, 3), FP8),
        (fp(2, 1), None),
        (fp(2, 1, granularity="block", block_size=16), None),
        (fp(3, 4), None),
        (fp(1, 1), None),
    ],
    ids=["fp4/fp8", "e3m0/fp8", "fp4 per tensor/fp8", "fp6/fp8", "fp4", "fp4 in blocks", "e3m4", "e1m1"],
)
def test_a_graph_decodes_what_pytorch_does(weight, activation, dtype, make, tmp_path):
    source = make(weight, activation)
    graph = lower(source, tmp_path / "graph", dtype=dtype)
    assert_codes_are_pytorchs(source, graph)
    rows = compare_layers(Run(source, {dtype: graph}, {}))
    assert len(rows) == 3
    for row in rows:
        # fp32 sums in another order agree to 120 dB and more. In fp16 x / scale is itself rounded to 11 bits, so of the
        # codes, which have 4, one in some hundred falls to the other side.
        assert row["sqnr_db"] is None or row["sqnr_db"] >= (100 if dtype == "fp32" else 40), row
        assert (row["codes_different"] or 0.0) <= (1e-4 if dtype == "fp32" else 1e-2), row


def book(vector_size, codebook_size, **rest):
    return {"format": "codebook", "vector_size": vector_size, "codebook_size": codebook_size, **rest}


INT8 = {"format": "int", "bits": 8}


@pytest.fixture(scope="module")
def clustered(tmp_path_factory):
    """A small random DiT whose patch convolution and feed-forward have codebooks, made once for each request."""
    folder = tmp_path_factory.mktemp("clustered")
    wide = {"attention_head_dim": 64, "in_channels": 32, "out_channels": 32, "num_layers": 1}
    (folder / "config.json").write_text(json.dumps(TINY | wide))
    checkpoint = open_checkpoint(f"random:{folder}", steps=2)
    calibration = calibrate(checkpoint, folder / "calibration", samples=1)

    @cache
    def quantized_with(vector_size, codebook_size, granularity="tensor", activation=None):
        weight = book(vector_size, codebook_size, granularity=granularity)
        rule = {"weight": weight, "method": {"name": "kmeans", "iterations": 5}}
        rule |= {"activation": {"fp8": FP8, "int8": INT8}[activation]} if activation else {}
        rules = [{"layers": pattern, **rule} for pattern in ("pos_embed.proj", "*.ff.*")]
        recipe = recipes.parse("test", {"rule": [*rules, {"layers": "*", "keep": "float"}]})
        return quantize(checkpoint, recipe, calibration, tmp_path_factory.mktemp("q") / "quantized")

    return quantized_with


CODEBOOKS = [
    (4, 256, "tensor", None), (4, 256, "channel", None), (4, 256, "tensor", "fp8"), (4, 256, "tensor", "int8"),
    (2, 64, "tensor", None), (2, 64, "channel", None), (2, 64, "tensor", "fp8"), (2, 64, "tensor", "int8"),
    (2, 16, "channel", None), (1, 16, "tensor", "fp8"),
]  # fmt: skip
every_codebook = pytest.mark.parametrize("which", CODEBOOKS, ids=["-".join(map(str, one)) for one in CODEBOOKS])


@every_codebook
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_graph_decodes_codebooks_as_pytorch_does(which, dtype, clustered, tmp_path):
    source = clustered(*which)
    graph = lower(source, tmp_path / "graph", dtype=dtype)
    model = onnx.load(graph.file("model.onnx"))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    layers = quantized.quantized_layers(quantized.load(source))
    for node, layer in zip([n for n in model.graph.node if n.op_type == codebook.NAME], layers.values(), strict=True):
        codes, table = (torch.from_numpy(onnx.numpy_helper.to_array(tensors[n]).astype(np.float32)) for n in node.input)
        wanted = layer.weight_codebook[layer.weight_codes.int()].flatten(1)
        assert torch.equal(codebook.reference(codes, table), wanted)
        stored = sum(tensors[name].ByteSize() for name in node.input)
        assert stored <= layer.weight_codes.numel() * layer.spec.weight.bits / 8 + table.numel() * 4 + 200
    for row in compare_layers(Run(source, {dtype: graph}, {})):
        # as for looked-up grids above
        assert row["sqnr_db"] is None or row["sqnr_db"] >= (100 if dtype == "fp32" else 40), row
        assert (row["codes_different"] or 0.0) <= (1e-4 if dtype == "fp32" else 1e-2), row


@pytest.mark.parametrize("which", [CODEBOOKS[i] for i in (0, 2, 3, 4, 6)], ids=["2", "2-fp8", "2-int8", "3", "3-fp8"])
def test_codebooks_stay_compressed_in_the_engine_and_feed_the_matmul_asked_for(which, clustered, tmp_path):
    source = clustered(*which)
    graph = lower(source, tmp_path / "graph", dtype="fp16")
    rows = read_plan(build(graph, "trt-rtx", tmp_path / "engine", gpu="sm89"))
    for path, layer in quantized.quantized_layers(quantized.load(source)).items():
        decoders = [row for row in rows if f"{path}/{codebook.NAME}" in row.onnx_nodes and row.constant_bytes]
        held = layer.weight_codes.numel() * layer.spec.weight.bits / 8 + 2 * layer.weight_codebook.numel()
        assert sum(row.constant_bytes for row in decoders) <= 1.03 * held + 64, path
        if which[3]:
            kernels = [row for row in rows if row.kind in ("gemm", "correlation")]
            (kernel,) = [row for row in kernels if any(node.startswith(f"{path}/") for node in row.onnx_nodes)]
            assert set(kernel.input_types) == {which[3]}, kernel


def test_onnx_runtime_runs_codebooks_to_the_floor(clustered, tmp_path):
    source = clustered(2, 64, "channel", None)
    engine = build(lower(source, tmp_path / "graph", dtype="fp32"), "ort", tmp_path / "engine")
    reference = load_file(source.file(quantized.REFERENCE))
    feeds = {name: value.numpy() for name, value in reference_feeds(reference, 0).items()}
    output = torch.from_numpy(ort.open_runner(engine).run(feeds)["sample"])
    assert sqnr_db(reference["0/quantized"], output) >= 100  # nothing rounds to codes at run time


@pytest.mark.parametrize(
    ("weight", "activation", "named", "fix"),
    [
        (book(8, 256), None, "256 × 8 for 512 sub-vectors: at least 1024", "smaller codebook_size"),
        (book(7, 16), None, "no multiple of 7", "another vector_size"),
        (book(4, 256, granularity="channel"), FP8, "TensorRT-RTX crashes", 'granularity "tensor"'),
        (book(4, 256, granularity="block", block_size=16), None, "scaled in blocks", "channel"),
    ],
    ids=["too few weights", "does not divide", "channel scales", "blocks"],
)
def test_codebooks_that_make_no_sense_are_refused(weight, activation, named, fix, make):
    with pytest.raises(UserError, match=named) as raised:
        make(weight, activation, {"name": "kmeans"})
    assert fix in raised.value.fix


@pytest.mark.parametrize(
    ("weight", "method", "named"),
    [(book(4, 256), "rtn", "makes no codebooks"), (fp(2, 1), "kmeans", "makes codebooks only")],
)
def test_methods_and_formats_that_do_not_go_together_are_refused(weight, method, named, make):
    with pytest.raises(UserError, match=named):
        make(weight, None, {"name": method})


@pytest.mark.parametrize(
    ("leaf", "spoil", "named"),
    [
        ("weight_codes", lambda t: t[:-1], "weight_codes"),
        ("weight_codebook", lambda t: t[:-1], "weight_codebook"),
        ("weight_codebook", lambda t: t.index_fill(0, torch.tensor([3]), float("nan")), "NaN"),
    ],
    ids=["truncated codes", "codes beyond the codebook", "NaN"],
)
def test_spoilt_codebooks_are_refused_when_they_are_read(leaf, spoil, named, clustered, monkeypatch):
    original = quantized.StoredTensors.raw

    def raw(self, name):
        return spoil(original(self, name)) if name.endswith(f"net.2.{leaf}") else original(self, name)

    monkeypatch.setattr(quantized.StoredTensors, "raw", raw)
    with pytest.raises(UserError, match=named):
        quantized.load(clustered(2, 64, "tensor", None))


def assert_codes_are_pytorchs(source, graph):
    """The bits in the file are those of the codes, and the table finds their values with them."""
    model = onnx.load(graph.file("model.onnx"))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    layers = quantized.quantized_layers(quantized.load(source))
    decoders = [node for node in model.graph.node if node.op_type == codebook.NAME]
    assert [node.name for node in decoders] == [f"{path}/{codebook.NAME}" for path in layers]
    for node, layer in zip(decoders, layers.values(), strict=True):
        codes = onnx.numpy_helper.to_array(tensors[node.input[0]]).astype(np.int8)
        table = torch.from_numpy(onnx.numpy_helper.to_array(tensors[node.input[1]]).astype(np.float32))
        stored = torch.from_numpy(codes)
        bits = 4 if layer.spec.weight.bits <= 4 else 8
        assert torch.equal(stored.view(torch.uint8) & (2**bits - 1), layer.weight_codes)
        assert torch.equal(codebook.reference(stored, table), layer.spec.weight.decode(layer.weight_codes))


def test_fp4_weights_stay_4_bits_in_the_engine_and_meet_fp8_activations(make, tmp_path):
    graph = lower(make(fp(2, 1), FP8), tmp_path / "graph", dtype="fp16")
    rows = read_plan(build(graph, "trt-rtx", tmp_path / "engine", gpu="sm89"))
    for path, op in (
        ("transformer_blocks.0.ff.net.0.proj", "MatMul"),
        ("transformer_blocks.0.ff.net.2", "MatMul"),
        ("pos_embed.proj", "Conv"),
    ):
        (kernel,) = [row for row in rows if f"{path}/{op}" in row.onnx_nodes and row.kind in ("gemm", "correlation")]
        assert set(kernel.input_types) == {"fp8"}, kernel
        (decoder,) = [r for r in rows if f"{path}/{codebook.NAME}" in r.onnx_nodes and "int4" in r.constant_types]
        assert decoder.output_types == ("fp8",), decoder


def test_an_engine_that_inlines_the_body_keeps_the_weight_compressed(make, tmp_path):
    source = make(fp(2, 1), FP8)
    graph = lower(source, tmp_path / "graph", dtype="fp32")
    engine = build(graph, "ort", tmp_path / "engine")
    rows = read_plan(engine)
    stored = sum(row.constant_bytes for row in rows)
    assert stored <= 1.03 * graph.info["weight_bytes"]
    assert sum("int4" in row.constant_types for row in rows) == 3
    reference = load_file(source.file(quantized.REFERENCE))
    feeds = {name: value.numpy() for name, value in reference_feeds(reference, 0).items()}
    output = torch.from_numpy(ort.open_runner(engine).run(feeds)["sample"])
    assert (
        sqnr_db(reference["0/quantized"], output)
        >= sqnr_db(reference["0/quantized_fp64"], reference["0/quantized"]) - 3
    )


@pytest.mark.parametrize(
    ("weight", "activation", "named", "fix"),
    [
        (fp(3, 4), FP8, "fp8_e3m4", "at most 3 mantissa bits"),
        (fp(6, 1), None, "exist in fp16", "at most 4 exponent bits"),
    ],
    ids=["too fine", "too wide"],
)
def test_weights_that_no_matmul_takes_are_refused_before_anything_is_quantized(weight, activation, named, fix, make):
    with pytest.raises(UserError) as caught:
        make(weight, activation)
    assert "pos_embed.proj" in caught.value.what
    assert named in caught.value.what
    assert fix in caught.value.fix
