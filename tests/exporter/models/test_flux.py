"""FLUX.1: what diffusers computes without its fp64, exact folds, a graph that engines take, its own captions."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from families import (
    assert_folds_exact,
    assert_lowers,
    assert_shapes,
    built,
    clip_encoder,
    family,
    feeds_of,
    t5_encoder,
    tokenizer,
)

from engines.errors import UserError
from exporter.models._flux import RotaryTable

NAMES = ("flux-dev", "flux-schnell")
SIZES = {"batch": 2, "text_tokens": 7, "image_tokens": 36}


@pytest.mark.parametrize("name", NAMES)
def test_it_computes_what_diffusers_does(name):
    found = family(name)
    model, feeds = built(found), feeds_of(found, SIZES)
    config = {key: value for key, value in found.config.items() if key != "sample_size"}
    plain = diffusers.FluxTransformer2DModel.from_config(config).eval()
    plain.load_state_dict(model.state_dict())
    ids = {key: feeds[key][0] for key in ("img_ids", "txt_ids")}
    with torch.no_grad():
        wanted = plain(**{**feeds, **ids}, return_dict=False)[0]
    torch.testing.assert_close(found.call(model, feeds), wanted, rtol=1e-5, atol=1e-5)


def test_rotary_tables_give_diffusers_angles_and_stay_in_fp32():
    axes = (16, 56, 56)
    ids = torch.stack([torch.zeros(64), torch.arange(64.0), torch.arange(64.0).flip(0)], dim=1)
    table = torch.nn.Sequential(RotaryTable(axes)).half()
    for got, wanted in zip(table(ids), FluxPosEmbed(10_000, axes)(ids), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_a_timestep_is_not_rounded_to_the_models_type():
    model = built(family("flux-schnell")).half()
    seen = []
    model.time_text_embed.time_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = family("flux-schnell")
    feeds = {name: v if name == "timestep" else v.half() for name, v in feeds_of(found, SIZES).items()}
    found.call(model, feeds)
    assert torch.equal(seen[0], 1000 * feeds["timestep"])


@pytest.mark.parametrize("name", NAMES)
def test_its_folds_are_exact(name):
    assert len(assert_folds_exact(family(name), SIZES)) == 2 * 5 + 1 + 1


@pytest.mark.parametrize("name", ["flux-dev"])  # schnell's graph is a part of it
def test_its_graph_computes_the_same_at_other_sizes(name):
    assert_lowers(family(name, num_layers=1), {"batch": 3, "text_tokens": 11, "image_tokens": 25})


@pytest.mark.parametrize(("name", "tokens"), [("flux-dev", 512), ("flux-schnell", 256)])
def test_captions_and_positions_become_its_inputs(name, tokens):
    found = family(name)
    pipeline = diffusers.FluxPipeline(
        text_encoder=clip_encoder(64, projected=False), tokenizer=tokenizer(77, clip=True),
        text_encoder_2=t5_encoder(64), tokenizer_2=tokenizer(512, clip=False),
        scheduler=None, vae=None, transformer=None, image_encoder=None, feature_extractor=None,
    )  # fmt: skip
    wanted, unwanted = found.encode(pipeline, ["a blue circle", "red square"])
    assert unwanted == {}
    rows = wanted | found.constants(2)
    assert_shapes(found, rows)
    assert rows["encoder_hidden_states"].shape[:2] == rows["txt_ids"].shape[:2] == (2, tokens)
    assert rows["img_ids"].shape == (2, found.tokens(), 3)
    ids = diffusers.FluxPipeline._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32)
    assert torch.equal(rows["img_ids"][1], ids)
    feeds = found.feeds(torch.zeros(2, *found.latent_shape()), torch.tensor([500, 500]), rows, 3.5)
    assert feeds.keys() == {spec.name for spec in found.inputs()}
    assert feeds["timestep"].tolist() == [0.5, 0.5]


def test_a_model_that_also_reads_a_picture_is_refused():
    with pytest.raises(UserError, match="reads a picture"):
        family("flux-dev", in_channels=384, out_channels=64).build()


def test_a_latent_is_1024_pixels_unless_the_config_says_otherwise():
    assert family("flux-dev", sample_size=None).latent_shape() == (4096, 64)
