"""The main road with codebooks: trained, lowered, built by both backends, compressed all the way, checked."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from common import TINY

from exporter.cli import main

RECIPE = """
[calibration]
samples = 16
[[rule]]
layers = "*"
scope = "outside_blocks"
keep = "float"
[[rule]]
layers = "*"
weight = {{ format = "codebook", vector_size = {vector_size}, codebook_size = {codebook_size} }}
{activation}
method = {{ name = "vq4dit", iterations = 8, codebook_iterations = 4, rows = 28, batch = 16 }}
"""
FP8 = 'activation = { format = "fp", exponent_bits = 4, mantissa_bits = 3, observer = "mse" }'
CASES = {"2 bits": (4, 64, ""), "3 bits, FP8": (2, 64, FP8)}


@pytest.mark.parametrize("case", CASES)
def test_a_run_with_codebooks_passes_its_own_checks(case, tmp_path):
    vector_size, codebook_size, activation = CASES[case]
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(TINY | {"num_layers": 1, "num_attention_heads": 4}))
    text = RECIPE.format(vector_size=vector_size, codebook_size=codebook_size, activation=activation)
    (tmp_path / "vq.toml").write_text(text)
    arguments = ["run", f"random:{model}", "--recipe", tmp_path / "vq.toml", "--out", out, "--steps", "2", "--json"]
    finished = CliRunner().invoke(main, [*map(str, arguments), "--backend", "ort", "--backend", "trt-rtx"])
    assert finished.exit_code == 0, finished.output
    report = json.loads((out / "report.json").read_text())
    assert report["passed"]
    stored = report["weights"]["by_format"]["codebook"]
    codes = 6 / vector_size
    assert codes < stored["bits_per_weight"] < 3 * codes  # codebooks of a model so small weigh as much as codes
    ort, trt = report["engines"]
    for engine in (ort, trt):
        graph = json.loads((out / "graph" / engine["dtype"] / "manifest.json").read_text())["info"]
        assert engine["weight_bytes"] <= 1.03 * graph["weight_bytes"]
        assert engine["resident_weight_bytes"] == engine["weight_bytes"]
        assert graph["layers"].keys() <= graph["module_bytes"].keys()
    assert ort["decode"] == "run"
    assert {row["kind"] for row in ort["layers"]} >= {"codebookmatmul"}
    if activation:
        gemms = [row for row in trt["layers"] if row["kind"] == "gemm" and "fp8" in row["input_types"]]
        assert gemms
