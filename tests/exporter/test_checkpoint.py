"""Checkpoints: shipped, local and random models open, load tensor by tensor, and have digests of their content."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from common import TINY
from diffusers import DiTTransformer2DModel

from engines.errors import UserError
from exporter.checkpoint import open_checkpoint


def test_a_loaded_model_computes_what_diffusers_own_loading_does(tiny_folder):
    checkpoint = open_checkpoint(str(tiny_folder))
    ours, theirs = checkpoint.load(), DiTTransformer2DModel.from_pretrained(tiny_folder).eval()
    feeds = {
        "hidden_states": torch.randn(2, 1, 8, 8),
        "timestep": torch.tensor([3, 999]),
        "class_labels": torch.tensor([1, 10]),
    }
    with torch.no_grad():
        assert torch.equal(ours(**feeds).sample, theirs(**feeds).sample)


def test_a_skeleton_takes_no_memory_for_parameters_but_has_its_buffers(checkpoint):
    model = checkpoint.skeleton()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(not buffer.is_meta for buffer in model.buffers())


def test_the_shipped_model_is_a_pipeline_folder(checkpoint):
    assert checkpoint.sampler["steps"] <= 50
    assert checkpoint.scheduler["_class_name"] == "DDIMScheduler"
    assert checkpoint.task_net is not None
    assert checkpoint.in_pixels
    assert checkpoint.notes == ()


def test_a_folder_without_a_scheduler_says_what_is_used(tiny_folder):
    notes = " ".join(open_checkpoint(str(tiny_folder)).notes)
    assert "DDIM" in notes
    assert "25 steps" in notes


def test_random_models_are_equal_by_config_and_seed(tiny_folder, tmp_path):
    shutil.copy(tiny_folder / "config.json", tmp_path)
    first, second = (open_checkpoint(f"random:{tmp_path}") for _ in range(2))
    assert first.digest == second.digest
    for (name, a), b in zip(first.load().named_parameters(), second.load().parameters(), strict=True):
        assert torch.equal(a, b), name
    assert open_checkpoint(f"random:{tmp_path}", seed=1).digest != first.digest


def test_the_digest_follows_weights_and_sampler(tiny_folder, tmp_path):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    before = open_checkpoint(str(model)).digest
    assert open_checkpoint(str(tiny_folder)).digest == before
    assert open_checkpoint(str(model), steps=7).digest != before
    weights = model / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert open_checkpoint(str(model)).digest != before


@pytest.mark.parametrize(
    "change",
    [
        {"sample_size": [1, 2, 3]},
        {"sample_size": "8"},
        {"in_channels": "x"},
        {"_class_name": ["DiT"]},
        {"patch_size": 0},
    ],
)
def test_a_config_that_no_model_follows_from_is_refused(tmp_path, change):
    (tmp_path / "config.json").write_text(json.dumps(TINY | change))
    with pytest.raises(UserError, match=r"config\.json: "):
        open_checkpoint(f"random:{tmp_path}").skeleton()


@pytest.mark.parametrize("change", [{"num_layers": 3}, {"num_attention_heads": 3}, {"sample_size": "x"}])
def test_a_config_that_does_not_fit_its_weights_is_refused(tiny_folder, tmp_path, change):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError) as caught:
        open_checkpoint(str(model)).load()
    assert str(model) in caught.value.what


def test_a_task_net_outside_the_folder_is_refused(tiny_folder, tmp_path):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    (model / "sampler.json").write_text(json.dumps({"task_net": "../elsewhere.safetensors"}))
    with pytest.raises(UserError, match="leaves the folder"):
        assert open_checkpoint(str(model)).task_net
