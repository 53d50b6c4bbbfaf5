"""PixArt α and Σ: what diffusers computes, with exact folds, a graph that engines take, and their own captions."""

from __future__ import annotations

import diffusers
import pytest
import torch
from families import (
    assert_folds_exact,
    assert_lowers,
    assert_shapes,
    built,
    family,
    feeds_of,
    relative,
    t5_encoder,
    tokenizer,
)

NAMES = ("pixart-alpha", "pixart-sigma")
SIZES = {"batch": 2, "text_tokens": 7}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("captions", [64, None])
def test_it_computes_what_diffusers_does(name, captions):
    found = family(name, caption_channels=captions)
    model, feeds = built(found), feeds_of(found, SIZES)
    plain = diffusers.PixArtTransformer2DModel.from_config(found.config).eval()
    plain.load_state_dict(model.state_dict())
    added = {key: feeds.pop(key) for key in ("resolution", "aspect_ratio") if key in feeds}
    with torch.no_grad():
        wanted = plain(**feeds, added_cond_kwargs=added or None, return_dict=False)[0]
        got = found.call(model, feeds | added)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert tuple(got.shape[1:]) == found.output().shape[1:]
    assert tuple(found.prediction(got).shape[1:]) == found.latent_shape()


@pytest.mark.parametrize("name", NAMES)
def test_its_folds_are_exact(name):
    assert len(assert_folds_exact(family(name), SIZES)) == 2 * 2 + 1


def test_padding_is_not_read():
    found = family("pixart-sigma")
    model, feeds = built(found), feeds_of(found, SIZES)
    other = dict(feeds)
    other["encoder_hidden_states"] = feeds["encoder_hidden_states"].clone()
    other["encoder_hidden_states"][feeds["encoder_attention_mask"] == 0] += 1
    assert relative(found.call(model, other), found.call(model, feeds)) < 1e-6


@pytest.mark.parametrize("name", ["pixart-alpha"])  # Σ's graph is a part of it
def test_its_graph_computes_the_same_at_other_sizes(name):
    assert_lowers(family(name, num_layers=1), {"batch": 3, "text_tokens": 11})


@pytest.mark.parametrize(("name", "tokens"), [("pixart-alpha", 120), ("pixart-sigma", 300)])
def test_captions_and_sizes_become_its_inputs(name, tokens):
    found = family(name)
    pipeline = getattr(diffusers, found.text_pipeline())(
        tokenizer=tokenizer(512, clip=False), text_encoder=t5_encoder(64), vae=None, transformer=None, scheduler=None
    )
    for rows in found.encode(pipeline, ["a blue circle", "red square"]):
        assert_shapes(found, rows)
        assert rows["encoder_hidden_states"].shape == (2, tokens, 64)
        assert rows.keys() | found.constants(2).keys() == {spec.name for spec in found.inputs()[2:]}
    assert_shapes(found, found.constants(2))


@pytest.mark.parametrize(
    ("changes", "reads", "tokens"),
    [
        ({"sample_size": 128}, True, 120),  # PixArt-XL-2-1024-MS states neither
        ({"sample_size": 64}, False, 120),
        ({"sample_size": 128, "use_additional_conditions": False, "interpolation_scale": 2}, False, 300),
    ],
)
def test_alpha_and_sigma_are_told_apart(changes, reads, tokens):
    base = {"use_additional_conditions": None, "interpolation_scale": None}
    found = family("pixart-alpha", **{**base, **changes})
    assert bool(found.constants(1)) == reads
    assert found.axes()["text_tokens"].opt == tokens


def test_sizes_are_in_pixels():
    assert family("pixart-alpha").constants(2)["resolution"].tolist() == [[128, 128]] * 2
