"""Stable Diffusion 3 and 3.5: what diffusers computes, exact folds, a graph that engines take, their own captions."""

from __future__ import annotations

import diffusers
import pytest
import torch
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

NAMES = ("sd3", "sd35")
SIZES = {"batch": 2, "text_tokens": 7, "height": 12, "width": 24}


@pytest.mark.parametrize("name", NAMES)
def test_it_computes_what_diffusers_does(name):
    found = family(name)
    model, feeds = built(found), feeds_of(found, SIZES)
    plain = diffusers.SD3Transformer2DModel.from_config(found.config).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        wanted = plain(**feeds, return_dict=False)[0]
    torch.testing.assert_close(found.call(model, feeds), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "count"), [("sd3", 5 + 4 + 1), ("sd35", 7 + 4 + 1)])
def test_its_folds_are_exact(name, count):
    assert len(assert_folds_exact(family(name), SIZES)) == count


@pytest.mark.parametrize("name", ["sd35"])  # its graph holds all of SD3's
def test_its_graph_computes_the_same_at_other_sizes(name):
    assert_lowers(family(name), {"batch": 3, "text_tokens": 11, "height": 20, "width": 8})


@pytest.mark.parametrize("with_t5", [True, False])
def test_captions_become_its_inputs(with_t5):
    found = family("sd3")
    pipeline = diffusers.StableDiffusion3Pipeline(
        text_encoder=clip_encoder(32, projected=True),
        text_encoder_2=clip_encoder(32, projected=True),
        text_encoder_3=t5_encoder(64) if with_t5 else None,
        tokenizer=tokenizer(77, clip=True),
        tokenizer_2=tokenizer(77, clip=True),
        tokenizer_3=tokenizer(512, clip=False) if with_t5 else None,
        transformer=None, scheduler=None, vae=None, image_encoder=None, feature_extractor=None,
    )  # fmt: skip
    for rows in found.encode(pipeline, ["a blue circle", "red square"]):
        assert_shapes(found, rows)
        assert rows["encoder_hidden_states"].shape == (2, found.axes()["text_tokens"].opt, 64)
        assert rows.keys() == {spec.name for spec in found.inputs()[2:]}


def test_sizes_end_where_the_position_table_does():
    assert family("sd3").axes()["height"].max == 12 * 2  # twice the trained size would be 32
    assert family("sd3", pos_embed_max_size=16).axes()["height"].max == 32


def test_a_table_smaller_than_the_latent_is_refused():
    with pytest.raises(UserError, match="pos_embed_max_size"):
        family("sd3", pos_embed_max_size=4).build()


def test_it_attends_over_patches():
    assert family("sd3").tokens() == 64
