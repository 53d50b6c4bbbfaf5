"""Codebooks on ONNX Runtime, two ways: a matmul that decodes, or dense weights once opened; one file in either case."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache

import numpy as np
import onnx
import pytest
import torch
from bench_codebook_kernel import layer_graph, random_weight
from common import ROOT, TINY
from safetensors.torch import load_file

from engines import backends, native
from engines.artifacts import Artifact
from engines.backends import _codebooks, ort
from engines.build import build
from engines.errors import UserError
from engines.options import Options
from engines.plans import constant_bytes, read_plan
from exporter import lower as lowering
from exporter import quantized
from exporter import recipe as recipes
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.formats.codebook import Format
from exporter.layers import compare_layers
from exporter.lower import lower
from exporter.metrics import sqnr_db
from exporter.quantize import quantize, reference_feeds
from exporter.run_folder import Run

FP8 = {"format": "fp", "exponent_bits": 4, "mantissa_bits": 3}
INT8 = {"format": "int", "bits": 8}
LINEARS = [f"transformer_blocks.0.ff.net.{i}" for i in ("0.proj", "2")]
CONV = "pos_embed.proj"
# vector_size, codebook_size, granularity, activation
KINDS = {
    "2": (4, 256, "tensor", None), "3 by channels": (2, 64, "channel", None), "4": (1, 16, "tensor", None),
    "2 fp8": (4, 256, "tensor", FP8), "3 int8": (2, 64, "tensor", INT8),
}  # fmt: skip


@pytest.fixture(scope="module")
def graph_with(tmp_path_factory):
    """A small random DiT whose patch convolution and feed-forward have codebooks, and its fp32 graph."""
    folder = tmp_path_factory.mktemp("codebooks")
    wide = {"attention_head_dim": 64, "in_channels": 32, "out_channels": 32, "num_layers": 1}
    (folder / "config.json").write_text(json.dumps(TINY | wide))
    checkpoint = open_checkpoint(f"random:{folder}", steps=2)
    calibration = calibrate(checkpoint, folder / "calibration", samples=1)

    @cache
    def made(kind):
        vector_size, codebook_size, granularity, activation = KINDS[kind]
        weight = {"format": "codebook", "vector_size": vector_size, "codebook_size": codebook_size}
        rule = {"weight": weight | {"granularity": granularity}, "method": {"name": "kmeans", "iterations": 2}}
        rule |= {"activation": activation} if activation else {}
        rules = [{"layers": pattern, **rule} for pattern in ("pos_embed.proj", "*.ff.*")]
        recipe = recipes.parse("test", {"rule": [*rules, {"layers": "*", "keep": "float"}]})
        source = quantize(checkpoint, recipe, calibration, folder / kind / "quantized")
        return source, lower(source, folder / kind / "graph", dtype="fp32")

    return made


def output_of(engine, source):
    reference = load_file(source.file(quantized.REFERENCE))
    feeds = {name: value.numpy() for name, value in reference_feeds(reference, 0).items()}
    return torch.from_numpy(ort.open_runner(engine).run(feeds)["sample"])


def assert_agrees(output, source):
    """To 100 dB, as two orders of summation in fp32 do; where codes may flip, to the quantized model's own floor."""
    reference = load_file(source.file(quantized.REFERENCE))
    floor = sqnr_db(reference["0/quantized_fp64"], reference["0/quantized"]) - 3
    assert sqnr_db(reference["0/quantized"], output) >= min(100, floor)


def kernels(rows):
    """Returns the kinds of the layers that each module's matmul or convolution became."""
    return {p: {r.kind for r in rows if f"{p}/{op}" in r.onnx_nodes} for p, op in OPS}


OPS = [*((path, "MatMul") for path in LINEARS), (CONV, "Conv")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_matmul_decodes_its_own_weight(kind, graph_with, library, tmp_path):
    source, graph = graph_with(kind)
    engine = build(graph, "ort", tmp_path / "engine")
    rows = read_plan(engine)
    found = kernels(rows)
    integer = KINDS[kind][3] == INT8  # whose matmul of integers ONNX Runtime does better
    assert all(found[path] == ({"matmulintegertofloat"} if integer else {"codebookmatmul"}) for path in LINEARS), found
    decoders = {node for row in rows if row.kind == "codebookdequantizelinear" for node in row.onnx_nodes}
    assert decoders == {f"{path}/{_codebooks.DECODE}" for path in ([*LINEARS, CONV] if integer else [CONV])}
    assert constant_bytes(rows) <= 1.03 * graph.info["weight_bytes"]
    assert engine.info["decode"] == "run"
    assert engine.info["weight_bytes"] == engine.info["resident_weight_bytes"] == constant_bytes(rows)
    assert_agrees(output_of(engine, source), source)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_file_runs_without_the_library_to_the_same_numbers(kind, graph_with, monkeypatch, tmp_path):
    source, graph = graph_with(kind)
    engine = build(graph, "ort", tmp_path / "engine")
    ours = output_of(engine, source)
    monkeypatch.setattr(native, "library", lambda: None)
    assert not [row for row in ort.plan(engine.file("model.onnx"), graph.info) if row.kind.startswith("codebook")]
    portable = output_of(engine, source)
    assert_agrees(portable, source)
    assert sqnr_db(portable, ours) >= (40 if KINDS[kind][3] else 100)  # codes may flip between two orders of summation


@pytest.mark.parametrize("kind", KINDS)
def test_load_is_dense_in_memory_and_compressed_in_the_file(kind, graph_with, tmp_path):
    source, graph = graph_with(kind)
    engine = build(graph, "ort", tmp_path / "engine", options=Options(decode="load"))
    rows = read_plan(engine)
    assert not [row for row in rows if row.kind.startswith(("codebook", "gather")) and "codebook" in row.name]
    layers = quantized.quantized_layers(quantized.load(source))
    width = 1 if KINDS[kind][3] == INT8 else 4  # bytes of a decoded weight: ready for a matmul of integers, or fp32
    for path, op in OPS[:2]:
        held = sum(row.constant_bytes for row in rows if f"{path}/{op}" in row.onnx_nodes)
        assert held >= width * np.prod(layers[path].weight_shape), path
    assert engine.info["resident_weight_bytes"] == constant_bytes(rows)
    assert engine.info["weight_bytes"] == graph.info["weight_bytes"] < 0.95 * engine.info["resident_weight_bytes"]
    in_graph = graph.file("model.onnx").stat().st_size
    assert engine.file("model.onnx").stat().st_size <= in_graph + 8192 * len(layers)  # the bodies, written out
    assert_agrees(output_of(engine, source), source)


@pytest.mark.parametrize("decode", ["run", "load"])
def test_external_data_is_shared_and_not_rewritten(decode, graph_with, monkeypatch, tmp_path):
    source, _ = graph_with("3 by channels")
    monkeypatch.setattr(lowering, "EXTERNAL_BYTES", 0)
    graph = lower(source, tmp_path / "graph", dtype="fp32")
    engine = build(graph, "ort", tmp_path / "engine", options=Options(decode=decode))
    assert engine.file("model.onnx.data").samefile(graph.file("model.onnx.data"))
    assert engine.file("model.onnx").stat().st_size < 100_000
    assert_agrees(output_of(engine, source), source)


def test_layers_of_the_engines_own_graph_can_be_compared_with_pytorch(graph_with, tmp_path):
    source, graph = graph_with("2 fp8")
    engine = build(graph, "ort", tmp_path / "engine")
    own = Artifact(engine.path, engine.manifest | {"info": engine.info["graph"]})
    rows = compare_layers(Run(source, {"fp32": own}, {}))
    assert len(rows) == 3
    assert all(row["sqnr_db"] is None or row["sqnr_db"] >= 100 for row in rows), rows


def test_another_choice_is_another_engine_and_the_same_one_is_kept(graph_with, tmp_path):
    _, graph = graph_with("2")
    first = build(graph, "ort", tmp_path / "engine")
    assert build(graph, "ort", tmp_path / "engine", options=Options(decode="run")).digest == first.digest
    assert build(graph, "ort", tmp_path / "engine", options=Options(decode="load")).digest != first.digest


def test_a_graph_without_codebooks_has_nothing_to_decode(graph_of, tmp_path):
    graph = graph_of("int8", "fp32")
    engine = build(graph, "ort", tmp_path / "engine", options=Options(decode="load"))
    assert engine.file("model.onnx").samefile(graph.file("model.onnx"))


def test_a_backend_without_the_choice_refuses_one():
    assert backends.resolve("trt-rtx", Options()).decode is None
    assert backends.resolve("ort", Options()).decode == "run"
    with pytest.raises(UserError, match="--decode load: trt-rtx has no such choice"):
        backends.resolve("trt-rtx", Options(decode="load"))


def test_the_command_line_refuses_it_too_and_says_what_is_held_in_memory(cli, graph_with, tmp_path):
    _, graph = graph_with("2")
    refused = cli("build", graph.path, "--backend", "trt-rtx", "--decode", "load", "--out", tmp_path / "engine")
    assert refused.returncode == 2
    assert "fix:" in refused.stderr
    made = cli("build", graph.path, "--backend", "ort", "--decode", "load", "--out", tmp_path / "engine")
    assert made.returncode == 0, made.stderr
    shown = cli("inspect", tmp_path / "engine").stdout
    assert "decode: load" in shown
    assert "in memory" in shown


def test_a_missing_library_is_noted_with_its_reason_and_fix(graph_with, monkeypatch, tmp_path):
    _, graph = graph_with("2")
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "none.so")
    monkeypatch.setattr(native, "WHY_NOT", tmp_path / "why_not.txt")
    (tmp_path / "why_not.txt").write_text("no onnxruntime_cxx_api.h in /nowhere\n")
    note = ort.note(graph.info, Options(decode="run"))
    assert "no onnxruntime_cxx_api.h in /nowhere" in note
    assert "fix:" in note
    assert ort.note(graph.info, Options(decode="load")) is None
    assert ort.note({"weights": {"by_format": {"int8": {}}}}, Options(decode="run")) is None


def test_an_install_without_headers_goes_on_and_says_why(tmp_path):
    for name in ("setup.py", "engines/native/codebook_ops.cpp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {"EXPORT_ENGINE_ORT_INCLUDE": str(tmp_path), "PATH": "/usr/bin:/bin"}
    made = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert "the portable path will run: no onnxruntime_cxx_api.h in" in made.stderr + made.stdout
    assert "onnxruntime_cxx_api.h" in (tmp_path / "engines/native/why_not.txt").read_text()


def damaged(codes, table, how):
    if how == "cut":
        codes.raw_data = codes.raw_data[:-1]
    else:
        values = onnx.numpy_helper.to_array(table)
        table.CopyFrom(onnx.numpy_helper.from_array(values[: len(values) // 2], "codebook"))
    return layer_graph(codes, table)


def lacks_table(model):
    model.graph.node[0].input.pop()


def lacks_body(model):
    del model.functions[:]


def of_no_type(model):
    model.graph.initializer[0].data_type = 85


@pytest.mark.parametrize("decode", ["run", "load"])
@pytest.mark.parametrize(
    ("edit", "told"),
    [(lacks_table, "lacks a body that takes"), (lacks_body, "lacks a body"), (of_no_type, "no constants of INT4")],
)
def test_a_decoder_that_is_none_of_ours_is_refused_at_the_build(decode, edit, told, tmp_path):
    model = layer_graph(*random_weight(8, 16, Format(2, 16))[:2])
    edit(model)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(UserError, match=told):
        _codebooks.rewrite(tmp_path / "model.onnx", decode)


@pytest.mark.parametrize("decode", ["run", "load"])
@pytest.mark.parametrize("fmt", [Format(4, 256), Format(2, 64), Format(2, 16)], ids=["bytes", "6 bits", "nibbles"])
@pytest.mark.parametrize(
    ("how", "named"), [("cut", "bytes of codes, where"), ("beyond", "name entries that its table")]
)
def test_damaged_codes_are_refused_at_the_build(decode, fmt, how, named, tmp_path):
    codes, table, _ = random_weight(8, 8 * fmt.vector_size, fmt)
    onnx.save(damaged(codes, table, how), tmp_path / "model.onnx")
    with pytest.raises(UserError, match=f"0/CodebookDequantizeLinear: .*{named}"):
        _codebooks.rewrite(tmp_path / "model.onnx", decode)
