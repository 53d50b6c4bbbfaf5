"""Checkpoints: shipped, local and random models open, load tensor by tensor, and have digests of their content."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from common import FAMILIES, TINY
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel, UNet2DModel
from families import randomize
from safetensors.torch import load_file, save_file

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


WEIGHTS = "diffusion_pytorch_model.safetensors"


def edit_weights(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_weights_that_the_config_has_no_place_for_are_refused(tiny_folder, tmp_path):
    """As of a config with too few layers: the model would be another, and nothing would say so."""
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_layers": config["num_layers"] - 1}))
    with pytest.raises(UserError, match=r"hold 'transformer_blocks\.\d.* and \d+ more, for which its config.json has"):
        open_checkpoint(str(model)).load()


def of_class(cls, folder, name):
    """Saves a small model of a class as diffusers does."""
    made = randomize(cls.from_config({k: v for k, v in FAMILIES[name].items() if k != "_class_name"}))
    made.save_pretrained(folder)
    return folder


def test_a_table_of_positions_that_the_weights_hold_is_theirs(tmp_path):
    folder = of_class(SD3Transformer2DModel, tmp_path, "sd3")
    edit_weights(folder, lambda tensors: tensors["pos_embed.pos_embed"].mul_(1.5))
    theirs = SD3Transformer2DModel.from_pretrained(folder).pos_embed.pos_embed
    assert torch.equal(open_checkpoint(str(folder)).load().pos_embed.pos_embed, theirs)


def test_old_u_nets_whose_attentions_have_other_names_are_read_as_diffusers_reads_them(tmp_path):
    folder = of_class(UNet2DModel, tmp_path, "unet")

    def rename(tensors):
        names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
        for name in list(tensors):
            for new, old in names.items():
                if new in name:
                    tensors[name.replace(new, old)] = tensors.pop(name)

    edit_weights(folder, rename)
    assert any(".query." in name for name in load_file(folder / WEIGHTS))
    ours, theirs = open_checkpoint(str(folder)).load(), UNet2DModel.from_pretrained(folder).eval()
    for name, parameter in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter), name


@pytest.mark.parametrize(
    ("sampler", "told"),
    [
        ({"task_net": "gone.safetensors"}, "task_net = 'gone.safetensors' is no file beside it"),
        ({"prompts": "gone.txt"}, "prompts = 'gone.txt' is no file beside it"),
        ({"validation_prompts": "gone.txt"}, "validation_prompts = 'gone.txt' is no file"),
        ({"task": "digts"}, "did you mean 'digits'"),
    ],
)
def test_what_a_sampler_names_is_looked_for_when_it_is_read(sampler, told, tiny_folder, tmp_path):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    (model / "sampler.json").write_text(json.dumps(sampler))
    with pytest.raises(UserError) as caught:
        open_checkpoint(str(model))
    assert told in f"{caught.value.what} {caught.value.fix}"


@pytest.mark.parametrize("name", ["unet", "flux-schnell"])
def test_guidance_of_a_model_that_has_none_is_said_to_do_nothing(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES[name]))
    (tmp_path / "sampler.json").write_text(json.dumps({"guidance_scale": 4.0}))
    notes = open_checkpoint(f"random:{tmp_path}").notes
    assert any("guidance_scale = 4 says nothing to" in note for note in notes)


@pytest.mark.parametrize("name", ["sd3", "flux-dev"])
def test_a_model_of_flow_matching_without_a_scheduler_is_stepped_by_one_of_flow_matching(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES[name]))
    found = open_checkpoint(f"random:{tmp_path}")
    assert found.scheduler == {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    assert any("FlowMatchEulerDiscreteScheduler with diffusers' defaults" in note for note in found.notes)


def test_the_refiner_of_sdxl_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["sdxl"]))
    (tmp_path / "model_index.json").write_text(json.dumps({"requires_aesthetics_score": True}))
    with pytest.raises(UserError, match="refiner"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(("name", "channels"), [("sd", 9), ("unet", 8)])
def test_a_u_net_that_reads_a_picture_beside_the_latent_is_refused(name, channels, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES[name] | {"in_channels": channels}))
    with pytest.raises(UserError, match=f"{channels} channels in and .* reads a picture beside the latent"):
        open_checkpoint(f"random:{tmp_path}").skeleton()
