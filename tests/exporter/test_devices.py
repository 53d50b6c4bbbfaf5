"""Devices: one that is not there is refused, and a GPU comes to what the CPU does, but for the order of its sums."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from common import FAMILIES, TINY
from families import feeds_of
from killing import killed_after
from safetensors.torch import load_file

from calib_data.store import CalibrationSet
from engines.errors import UserError
from exporter import clustering, devices, quantized, recipe
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.methods import fp_search
from exporter.metrics import sqnr_db
from exporter.quantize import quantize, reference_steps
from exporter.runners import TorchRunner

MODELS = {"dit": TINY, "unet": FAMILIES["sd"]}
INT4, INT8 = ({"format": "int", "bits": bits} for bits in (4, 8))
FP8 = {"format": "fp", "exponent_bits": 4, "mantissa_bits": 3}
STEPPED = {"format": "int", "bits": 8, "observer": "mse", "granularity": "step"}
BOOK = {"format": "codebook", "vector_size": 2, "codebook_size": 16, "granularity": "tensor"}
SHORT = {"iterations": 20, "batch": 8, "rows": 32}
RULES = {
    "rtn": {"weight": INT8, "activation": {**INT8, "observer": "percentile"}, "method": {"name": "rtn"}},
    "smoothquant": {"weight": INT8, "activation": INT8, "method": {"name": "smoothquant"}},
    "zero points": {"weight": INT4, "activation": {**STEPPED, "zero_point": True}, "method": {"name": "fp_search"}},
    "floating point": {
        "weight": {"format": "auto", "bits": 4}, "activation": FP8,
        "method": {"name": "fp_rounding", "activation_iterations": 10, **SHORT},
    },
    "dilated jointly": {"weight": INT4, "activation": STEPPED, "method": {"name": "dilatequant", **SHORT}},
    "dilated by blocks": {
        "weight": INT4, "activation": STEPPED, "method": {"name": "dilatequant", "joint": False, "hold_mb": 0, **SHORT},
    },
    "uniform codebooks": {"weight": BOOK, "method": {"name": "uniform"}},
    "gptvq": {"weight": BOOK, "method": {"name": "gptvq"}},
    "vq4dit": {"weight": BOOK, "method": {"name": "vq4dit", "codebook_iterations": 10, **SHORT}},
}  # fmt: skip


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", ""])
def test_what_is_no_device_is_refused(name):
    with pytest.raises(UserError, match=r"--device .*: is none"):
        devices.resolve(name)


def test_without_a_gpu_cuda_is_refused_before_anything_is_read(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = cli("calibrate", "digits-dit", "--device", "cuda", "--out", tmp_path / "set")
    assert done.returncode == 2
    assert "--device cuda: PyTorch" in done.stderr
    assert "sees no GPU" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_of_a_number_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.resolve("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="there are 2 GPUs"):
        devices.resolve("cuda:2")


def test_a_gpu_whose_memory_is_full_is_told_and_what_was_recorded_is_kept(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    checkpoint, calls = open_checkpoint(f"random:{tmp_path}", steps=2), []

    def run(self, feeds):
        calls.append(feeds)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. If reserved but …")
        return original(self, feeds)

    original = TorchRunner.run
    with monkeypatch.context() as context:
        context.setattr(TorchRunner, "run", run)
        with pytest.raises(UserError, match=r"memory is full: CUDA out of memory\. Tried to allocate 20\.00 MiB\.\n"):
            calibrate(checkpoint, tmp_path / "set", samples=32)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1  # of two batches, the first
    assert calibrate(checkpoint, tmp_path / "set", samples=32).info["samples"] == 32


@pytest.mark.parametrize("name", FAMILIES)
def test_all_of_a_family_moves_to_another_device(name, tmp_path):
    """`meta`, where nothing is computed, refuses a constant that stayed behind as a GPU would."""
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES[name]))
    checkpoint = open_checkpoint(f"random:{tmp_path}", steps=2)
    model, family = checkpoint.load(), checkpoint.family
    feeds = feeds_of(family, {axis: bounds.opt for axis, bounds in family.axes().items()} | {"batch": 2})
    devices.place(model, torch.device("meta"))
    (output,) = TorchRunner("moved", model, family).run_tensors(feeds).values()
    assert output.device.type == "meta"


@pytest.mark.parametrize("name", ["floating point", "vq4dit"])
def test_a_training_goes_on_from_where_it_began_though_a_search_now_ends_elsewhere(name, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    checkpoint = open_checkpoint(f"random:{tmp_path}", steps=3)
    data = calibrate(checkpoint, tmp_path / "calibration", samples=16)
    whole = quantize(checkpoint, asked(name), data, tmp_path / "whole")
    with killed_after(5, monkeypatch):
        quantize(checkpoint, asked(name), data, tmp_path / "killed")
    monkeypatch.setattr(fp_search, "CLIPS", fp_search.CLIPS[:40])  # as on another device, ties fall otherwise: but more
    monkeypatch.setattr(clustering, "kmeans", functools.partial(clustering.kmeans, seed=1))
    resumed = quantize(checkpoint, asked(name), data, tmp_path / "killed")
    block = "transformer_blocks.0"  # what was under way when it was killed
    ours, theirs = (quantized.load(made).get_submodule(block).state_dict() for made in (whole, resumed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_the_record_says_where_it_was_computed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    made = calibrate(open_checkpoint(f"random:{tmp_path}", steps=2), tmp_path / "set", samples=2)
    assert json.loads((made.path / "timings.json").read_text())["device"] == "cpu"


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here")


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "config.json").write_text(json.dumps(MODELS[request.param]))
    checkpoint = open_checkpoint(f"random:{folder}", steps=3)
    return checkpoint, calibrate(checkpoint, folder / "calibration", samples=16)


def asked(name):
    kept = {"layers": "*", "scope": "outside_blocks", "keep": "float"}
    return recipe.parse(name, {"rule": [kept, {"layers": "*", **RULES[name]}]})


def error_db(source):
    """Returns how near a quantized model's outputs are to the float one's, in dB, the mean over steps."""
    reference = load_file(source.file(quantized.REFERENCE))
    found = [sqnr_db(reference[f"{s}/float"], reference[f"{s}/quantized"]) for s in reference_steps(reference)]
    return sum(found) / len(found)


@on_a_gpu
def test_a_gpu_samples_what_the_cpu_samples(model, tmp_path):
    checkpoint, ours = model
    theirs = calibrate(checkpoint, tmp_path / "set", samples=16, device=devices.resolve("cuda"))
    for a, b in zip(
        *(CalibrationSet(made).batches(CalibrationSet(made).shards) for made in (ours, theirs)), strict=True
    ):
        for name, value in a.items():
            assert torch.allclose(value.float(), b[name].float(), rtol=1e-3, atol=1e-4), name  # three steps of fp32


@on_a_gpu
@pytest.mark.parametrize("name", RULES)
def test_a_gpu_comes_to_what_the_cpu_comes_to(name, model, tmp_path):
    checkpoint, data = model
    made = {
        where: quantize(checkpoint, asked(name), data, tmp_path / where, device=devices.resolve(where))
        for where in ("cpu", "cuda")
    }
    assert made["cuda"].info["layers"] == made["cpu"].info["layers"]
    # ties of a search fall otherwise, and twenty iterations, or what is kept of them, differ by a decibel from there
    trains = "iterations" in RULES[name]["method"]
    assert abs(error_db(made["cuda"]) - error_db(made["cpu"])) < (2.0 if trains else 0.5)


@on_a_gpu
@pytest.mark.parametrize("name", ["floating point", "dilated jointly", "dilated by blocks", "vq4dit"])
def test_a_training_on_a_gpu_that_is_killed_goes_on(name, model, tmp_path, monkeypatch):
    checkpoint, data = model
    cuda = devices.resolve("cuda")
    whole = quantize(checkpoint, asked(name), data, tmp_path / "whole", device=cuda)
    with killed_after(12, monkeypatch):
        quantize(checkpoint, asked(name), data, tmp_path / "killed", device=cuda)
    resumed = quantize(checkpoint, asked(name), data, tmp_path / "killed", device=cuda)
    assert abs(error_db(resumed) - error_db(whole)) < 0.2  # sums of atomics come in no fixed order
