"""U-Nets: what diffusers computes, blocks in running order, exact folds, skips as they are concatenated, conditions."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
from common import FAMILIES
from families import assert_folds_exact, assert_shapes, built, clip_encoder, family, feeds_of, relative, tokenizer

from engines.errors import UserError
from exporter import recipe as recipes
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.metrics import sqnr_db
from exporter.modules import SplitConv2d, float_layers, split_inputs
from exporter.quantize import quantize, reference_steps
from exporter.quantized import REFERENCE, load_file

NAMES = ("unet", "sd", "sdxl")
SIZES = {"batch": 2, "text_tokens": 7, "height": 16, "width": 24}
OUTSIDE = ("conv_in.", "conv_norm_out.", "conv_out.", "time_embedding.", "add_embedding.", "class_embedding.")
# Three levels of unequal widths: what comes from below and what was skipped differ at every concatenation.
DEEP = {"block_out_channels": [32, 64, 96], "layers_per_block": 2}
DEEP_TYPES = {
    "unet": {
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
    "sd": {
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    },
}


def deep(name, **changes):
    return family(name, **DEEP, **DEEP_TYPES[name], **changes)


@pytest.mark.parametrize("name", NAMES)
def test_it_computes_what_diffusers_does(name):
    found = family(name)
    model, feeds = built(found), feeds_of(found, SIZES)
    plain = getattr(diffusers, found.CLASS).from_config(found.config).eval()
    plain.load_state_dict(model.state_dict(), strict=False)  # their timestep frequencies are no parameters
    with torch.no_grad():
        wanted = found.call(plain, feeds)
        torch.testing.assert_close(found.call(model, feeds), wanted, rtol=1e-5, atol=1e-5)
    assert wanted.shape == (2, found.config["out_channels"], 16, 24)


@pytest.mark.parametrize("name", ["unet", "sd"])
def test_blocks_are_named_in_the_order_they_run(name):
    found = deep(name)
    model = built(found)
    ran = []
    for path in found.blocks(model):
        model.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: ran.append(path))
    found.call(model, feeds_of(found, SIZES))
    assert ran == found.blocks(model)


@pytest.mark.parametrize("found", [deep("unet"), deep("sd"), family("sdxl")], ids=["unet", "sd", "sdxl"])
def test_blocks_cover_every_layer_but_the_first_the_last_and_the_embedders(found):
    model = built(found)
    blocks = found.blocks(model)
    outside = {p for p in float_layers(model) if not any(p.startswith(f"{block}.") for block in blocks)}
    assert outside == {path for path in float_layers(model) if f"{path}.".startswith(OUTSIDE)}
    assert {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"} <= outside


@pytest.mark.parametrize(
    ("name", "changes", "count"),
    [
        ("unet", {}, 0),  # its attentions are none of the transformer blocks
        ("sd", {}, 4 * (6 + 1)),  # per transformer block three norms, two V, one GEGLU; per attention one proj_in
        ("sd", {"only_cross_attention": True}, 4 * (6 + 1)),  # K and V of the first attention read text too
        ("sdxl", {}, 4 * (2 * 6 + 1)),
    ],
    ids=["unet", "sd", "sd reading text twice", "sdxl"],
)
def test_its_folds_are_exact(name, changes, count):
    sizes = {"batch": 1, "text_tokens": 3, "height": 8, "width": 8}
    assert len(assert_folds_exact(family(name, **changes), sizes)) == count


def concatenated(found, model, monkeypatch):
    """Returns the channels of the first part of what each layer reads, where that is a concatenation of two."""
    joined, read = [], {}
    cat = torch.cat

    def watch(tensors, *arguments, **options):
        made = cat(tensors, *arguments, **options)
        if made.ndim == 4 and len(tensors) == 2:
            joined.append((made, tensors[0].shape[1]))
        return made

    def look(path):
        def hook(_layer, args):
            for made, first in joined:
                if made.data_ptr() == args[0].data_ptr():
                    read[path] = first

        return hook

    for path, layer in float_layers(model).items():
        layer.register_forward_pre_hook(look(path))
    monkeypatch.setattr(torch, "cat", watch)
    found.call(model, feeds_of(found, SIZES))
    monkeypatch.undo()
    return read


@pytest.mark.parametrize("name", ["unet", "sd"])
def test_skips_are_the_layers_that_read_a_concatenation_and_where_its_first_part_ends(name, monkeypatch):
    found = deep(name)
    model = built(found)
    read = concatenated(found, model, monkeypatch)
    assert len(read) == 3 * 3  # up blocks, residual blocks of each
    assert len(set(read.values())) == 3
    assert found.skips(model) == read


def test_a_model_without_a_middle_still_names_the_skips_it_is_sure_of(monkeypatch):
    found = deep("unet", mid_block_type=None)
    model = built(found)
    read = concatenated(found, model, monkeypatch)
    skips = found.skips(model)
    assert skips.items() <= read.items()
    assert read.keys() - skips.keys() == {"up_blocks.0.resnets.0.conv_shortcut"}


@pytest.mark.parametrize("name", ["unet", "sd"])
def test_splitting_skips_leaves_the_output_as_it_was(name):
    found = deep(name)
    model, feeds = built(found), feeds_of(found, SIZES)
    wanted, skips = found.call(model, feeds), found.skips(model)
    split_inputs(model, skips)
    assert sum(isinstance(module, SplitConv2d) for module in model.modules()) == len(skips) == 9
    # the same products, summed in two parts: fp32 rounds each sum by 6e-8
    assert relative(found.call(model, feeds), wanted) < 1e-5


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A U-Net whose highest skips are 50 times as large as what they are joined with, and weigh as much."""
    found = family("unet")
    model = built(found)
    with torch.no_grad():
        for parameter in (*model.conv_in.parameters(), *model.down_blocks[0].resnets[0].conv2.parameters()):
            parameter *= 50
        model.down_blocks[0].downsamplers[0].conv.weight /= 50
        for resnet in model.up_blocks[1].resnets:
            resnet.conv_shortcut.weight[:, -64:] /= 50
    folder = tmp_path_factory.mktemp("planted")
    model.register_to_config(**{k: v for k, v in FAMILIES["unet"].items() if k != "_class_name"})
    model.save_pretrained(folder, safe_serialization=True)
    checkpoint = open_checkpoint(str(folder), steps=2)
    return checkpoint, calibrate(checkpoint, folder / "calibration", samples=2)


def test_a_skip_far_larger_than_what_it_joins_quantizes_better_split(planted, tmp_path):
    checkpoint, calibration = planted

    def worst(split):
        int8 = {"format": "int", "bits": 8}
        rule = {"layers": "up_blocks.1.*.conv_shortcut", "weight": int8, "activation": int8, "split_skips": split}
        recipe = recipes.parse("test", {"rule": [rule, {"layers": "*", "keep": "float"}]})
        made = quantize(checkpoint, recipe, calibration, tmp_path / str(split))
        assert len(made.info["layers"]) == (4 if split else 2)
        assert len(made.info["splits"]) == (2 if split else 0)
        reference = load_file(made.file(REFERENCE))
        steps = reference_steps(reference)
        return min(sqnr_db(reference[f"{step}/float"], reference[f"{step}/quantized"]) for step in steps)

    # With one scale the smaller half has 50 times (34 dB) coarser steps than it needs, and is half of the output.
    assert worst(True) > worst(False) + 15


def test_sizes_are_multiples_of_what_the_network_halves_down_to():
    axes = deep("sd").axes()
    assert axes["height"].to_json() == {"min": 8, "opt": 16, "max": 32, "multiple": 4}
    assert axes["text_tokens"].to_json() == {"min": 1, "opt": 77, "max": 231, "multiple": 1}
    assert axes["batch"].to_json() == {"min": 1, "opt": 8, "max": 64, "multiple": 1}
    oblong = family("unet", sample_size=[16, 32])
    assert (oblong.axes()["height"].opt, oblong.axes()["width"].opt) == (16, 32)
    assert oblong.latent_shape() == (3, 16, 32)
    assert oblong.tokens() == 512


def test_large_latents_have_smaller_batches():
    assert family("unet", sample_size=256).axes()["batch"].max == 4


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sd", {"class_embed_type": "timestep"}),
        ("sd", {"num_class_embeds": 7}),
        ("sd", {"encoder_hid_dim": 32}),
        ("sd", {"encoder_hid_dim": 32, "encoder_hid_dim_type": "text_image_proj"}),
        ("sd", {"time_cond_proj_dim": 16}),
        ("sd", {"addition_embed_type": "image"}),
        ("unet", {"class_embed_type": "timestep"}),
        ("unet", {"class_embed_type": "identity"}),
        ("unet", {"time_embedding_type": "learned"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_inputs_that_are_not_served_are_refused(name, change):
    with pytest.raises(UserError, match=next(iter(change))) as caught:
        family(name, **change).build()
    assert "served" in caught.value.fix


def test_a_config_without_a_size_is_refused():
    with pytest.raises(UserError, match="sample_size") as caught:
        family("unet", sample_size=None).latent_shape()
    assert "sample_size" in caught.value.fix


def test_an_unconditional_model_asks_for_nothing():
    found = family("unet")
    assert [spec.name for spec in found.inputs()] == ["sample", "timestep"]
    assert found.classes() is None
    assert found.text_pipeline() is None
    assert not found.guided()


def test_class_labels_are_an_input_without_a_null_class():
    found = family("unet", num_class_embeds=5)
    assert [spec.name for spec in found.inputs()] == ["sample", "timestep", "class_labels"]
    assert found.classes() == 5
    wanted, unwanted = found.label(torch.tensor([4, 0]))
    assert wanted["class_labels"].tolist() == [4, 0]
    assert unwanted == {}
    assert not found.guided()
    model, feeds = built(found), feeds_of(found, SIZES)
    outputs = [found.call(model, feeds | {"class_labels": torch.full((2,), label)}) for label in (0, 4)]
    assert relative(*outputs) > 1e-3  # the label tells


def test_captions_become_a_models_inputs():
    found = family("sd")
    pipeline = diffusers.StableDiffusionPipeline(
        text_encoder=clip_encoder(64, projected=False), tokenizer=tokenizer(77, clip=True), vae=None, unet=None,
        scheduler=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    wanted, unwanted = found.encode(pipeline, ["a blue circle", "red square"])
    for rows in (wanted, unwanted):
        assert_shapes(found, rows)
        assert rows["encoder_hidden_states"].shape == (2, 77, 64)
    assert torch.equal(*unwanted["encoder_hidden_states"])
    assert not torch.equal(*wanted["encoder_hidden_states"])
    assert found.constants(2) == {}


def test_sdxl_reads_pooled_text_and_its_own_size_beside_captions():
    found = family("sdxl", projection_class_embeddings_input_dim=6 * 32 + 32)  # pooled text of 32
    pipeline = diffusers.StableDiffusionXLPipeline(
        text_encoder=clip_encoder(32, projected=False), text_encoder_2=clip_encoder(32, projected=True),
        tokenizer=tokenizer(77, clip=True), tokenizer_2=tokenizer(77, clip=True), vae=None, unet=None, scheduler=None,
    )  # fmt: skip
    for rows in found.encode(pipeline, ["a blue circle", "red square"]):
        assert_shapes(found, rows)
        assert rows["encoder_hidden_states"].shape == (2, 77, 64)  # both encoders', side by side
        assert rows["text_embeds"].shape == (2, 32)
        assert rows.keys() | found.constants(2).keys() == {spec.name for spec in found.inputs()[2:]}
    assert found.constants(3)["time_ids"].tolist() == [[128, 128, 0, 0, 128, 128]] * 3  # 16 latent positions, 8 pixels
    assert_shapes(found, found.constants(2))


def test_sdxl_conditions_reach_the_network():
    found = family("sdxl")
    model, feeds = built(found), feeds_of(found, SIZES)
    before = found.call(model, feeds)
    for name in ("text_embeds", "time_ids", "encoder_hidden_states"):
        assert relative(found.call(model, feeds | {name: feeds[name] + 1}), before) > 1e-4, name


def test_a_folder_with_a_unet_opens_as_a_random_model(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps(FAMILIES["sd"]))
    found = open_checkpoint(f"random:{tmp_path}")
    assert found.family.CLASS == "UNet2DConditionModel"
    assert found.skeleton().conv_in.weight.is_meta
