"""Before hours of work: what cannot work is refused in seconds, and what can is told with its cost."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from bench_real_unets import CONFIGS
from click.testing import CliRunner

from engines.errors import UserError
from exporter import preflight, preflight_tables, prove, recipe, sizes
from exporter.checkpoint import open_checkpoint
from exporter.cli import main
from exporter.estimate import estimates

# Source: FLUX.1-dev's config
FLUX = {
    "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 64, "num_layers": 19,
    "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": [16, 56, 56],
}  # fmt: skip


def invoke(*arguments):
    return CliRunner().invoke(main, ["preflight", *map(str, arguments)])


@pytest.mark.parametrize("gpu", ["sm80", "sm86"])
def test_fp8_is_refused_where_there_is_no_hardware_for_it(gpu):
    result = invoke("digits-dit", "--recipe", "fp8", "--gpu", gpu)
    assert result.exit_code == 2
    assert (
        f"'transformer_blocks.0.norm1.emb.timestep_embedder.linear_1' is fp8, with no hardware for it in {gpu}"
        in result.stderr
    )
    assert "nearest shipped recipe" in result.stderr
    assert "int8" in result.stderr


def test_json_is_one_document_with_every_part(tmp_path):
    result = invoke("digits-dit", "--recipe", "fp8", "--gpu", "sm89", "--no-prove", "--json", "--out", tmp_path / "new")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [target["backend"] for target in report["targets"]] == ["ort", "trt-rtx"]
    (row,) = report["formats"]
    assert (row["what"], row["layers"]) == ("linear", 54)
    assert row["gpus"]["trt-rtx"]["sm89"] is None
    assert "no hardware" in row["gpus"]["trt-rtx"]["sm86"]
    stages = [row["stage"] for row in report["stages"]]
    assert stages[:4] == ["calibrate", "quantize", "lower fp32", "lower fp16"]
    assert stages[4:] == ["build ort", "build trt-rtx", "validate"]
    assert report["disk"]["free_bytes"] > report["disk"]["needed_bytes"] > 0
    assert 0 < report["kept"]["share_of_weights"] < 0.05
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("gpu", "here", "built"),
    [
        (None, None, {"ort": None, "trt-rtx": "sm89"}),
        (None, "sm86", {"ort": None, "trt": "sm86", "trt-rtx": "sm86"}),
        ("sm86", "sm86", {"ort": None, "trt": "sm86", "trt-rtx": "sm86"}),
        ("sm120", "sm86", {"ort": None, "trt-rtx": "sm120"}),
    ],
)
def test_by_default_all_are_planned_that_build_here_for_the_gpu_that_is_meant(gpu, here, built, monkeypatch, capsys):
    monkeypatch.setattr(preflight.gpus, "detect", lambda: here)
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.4.0"))
    assert {target.backend: target.gpu for target in preflight.targets((), gpu, None)} == built
    assert ("note: trt is left out" in capsys.readouterr().err) == ("trt" not in built)


def test_a_backend_that_cannot_build_here_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    result = invoke("digits-dit", "--recipe", "fp8", "--backend", "trt")
    assert result.exit_code == 2
    assert "pip install tensorrt cuda-python, or --backend trt-rtx" in result.stderr


@pytest.mark.parametrize(
    ("model", "what"), [("digits-dit", "is fp8, with no hardware for it in sm80"), ("digit-dit", "unknown model")]
)
def test_a_refusal_is_a_json_document_too(model, what):
    result = invoke(model, "--recipe", "fp8", "--gpu", "sm80", "--json")
    assert result.exit_code == 2
    told = json.loads(result.stdout)
    assert told["model"] == {"name": model}
    assert what in told["refused"]["what"]
    assert told["refused"]["what"] in result.stderr
    assert told["refused"]["fix"] in result.stderr


def test_the_tables_have_what_json_has():
    result = invoke("digits-dit", "--recipe", "int4", "--backend", "ort", "--no-prove")
    assert result.exit_code == 0, result.output
    for part in ("left in float", "peak memory", "int4, by block", "proj_out_1", "bits to a quantized weight"):
        assert part in result.stdout


def test_what_several_gpus_lack_is_said_once_and_of_all_of_them():
    reasons = {gpu: f"layer 'a' is fp8, with no hardware for it in {gpu}" for gpu in ("sm75", "sm80")}
    told = list(preflight_tables._refusals({**reasons, "sm86": "another reason", "sm89": None}))
    assert told == ["layer 'a' is fp8, with no hardware for it in sm75, sm80", "another reason"]


def test_a_disk_that_is_too_small_is_refused_before_anything(monkeypatch, tmp_path):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: preflight.shutil._ntuple_diskusage(9, 8, 1))
    result = invoke("digits-dit", "--recipe", "int4", "--backend", "ort", "--no-prove", "--out", tmp_path)
    assert result.exit_code == 2
    assert "are free there" in result.stderr


def test_a_builder_that_crashes_on_a_kind_is_a_message_with_its_first_layer(monkeypatch):
    def crash(*arguments, **options):
        raise UserError("the trt-rtx builder crashed (SIGSEGV)", fix="try another recipe")

    monkeypatch.setattr(prove, "build", crash)
    result = invoke("digits-dit", "--recipe", "fp8", "--backend", "trt-rtx")
    assert result.exit_code == 2
    assert "builds no small layer like 'transformer_blocks.0.norm1.emb" in result.stderr
    assert "crashed (SIGSEGV)" in result.stderr


def test_small_layers_compile_to_the_kernels_asked_for():
    found = preflight.planned(open_checkpoint("shapes-unet"), recipe.load("fp4-fp8"))
    kinds = list(found.kinds)
    proofs = prove.prove(kinds, "trt-rtx", "sm89", "fp16")
    assert [proof.kind for proof in proofs] == kinds
    kernels = {proof.kind.what: proof.kernels for proof in proofs}
    assert kernels == {"linear": ("gemm of int4 × fp8",), "convolution": ("correlation of int4 × fp8",)}


@pytest.mark.parametrize("config", [CONFIGS["sdxl"], FLUX], ids=["sdxl", "flux"])
def test_models_of_any_size_are_planned_without_their_memory(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = preflight.planned(open_checkpoint(f"random:{tmp_path}", steps=1), recipe.load("fp8"))
    assert found.stored.bytes > 2e9
    assert found.stored.bits_per_weight == pytest.approx(8, rel=0.01)
    assert sizes.graph_bytes(found.checkpoint.family, found.calibrated, "fp16") > 2e9


def test_training_all_blocks_asks_for_more_memory_time_and_disk_than_rounding():
    checkpoint = open_checkpoint("digits-dit")
    plain, trained = (
        {one.stage: one for one in estimates(preflight.workload(preflight.planned(checkpoint, recipe.load(name)), []))}
        for name in ("int8", "dilate-w8a8")
    )
    for key in ("memory", "seconds", "disk"):
        assert getattr(trained["quantize"], key) > getattr(plain["quantize"], key), key
    assert "training of transformer_blocks.0 … transformer_blocks.5" in trained["quantize"].held
