"""Learned scores: what is missing is said, nothing is downloaded, and what is there is computed."""

from __future__ import annotations

import socket
import sys
import types

import pytest
import torch

from engines.errors import UserError
from exporter import learned_scores
from exporter.learned_scores import SCORES, available, score

PROMPTS = ["a red circle", "a blue square", "red"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def every_package(monkeypatch):
    """Stands for an installation that has all packages, so that only weights are missing."""
    for one in SCORES.values():
        for package in one.packages:
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))


def images(count: int = 3, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def counterparts(name: str) -> dict:
    return {"reference": images(seed=1)} if SCORES[name].against == "reference" else {"prompts": PROMPTS}


@pytest.fixture
def clip_weights(tmp_path):
    """A CLIP model of drawn weights, two layers deep, with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "<end>", *"a red blue circle square".split()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", model_max_length=8)
    tiny = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tiny | {"vocab_size": len(words), "max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 0}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=tiny | {"image_size": 32, "patch_size": 8}, projection_dim=8)
    folder = tmp_path / "clip-vit-large-patch14"
    CLIPModel(config).save_pretrained(folder)
    square = {"height": 32, "width": 32}
    CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square), fast).save_pretrained(folder)
    return tmp_path


def test_without_weights_no_score_is_available_and_each_says_why(every_package, tmp_path):
    reasons = available(tmp_path)
    assert reasons.keys() == SCORES.keys()
    assert all("weights are missing" in reason for reason in reasons.values())


@pytest.mark.parametrize("name", SCORES)
def test_a_missing_package_is_named_with_how_to_install_it(name, monkeypatch, tmp_path):
    package = SCORES[name].packages[-1]
    monkeypatch.setitem(sys.modules, package, None)
    for other in SCORES[name].packages[:-1]:
        monkeypatch.setitem(sys.modules, other, types.ModuleType(other))
    with pytest.raises(UserError, match=f"score {name}: package {package} cannot be imported") as caught:
        score(name, images(), weights=tmp_path, **counterparts(name))
    assert "pip install" in caught.value.fix


@pytest.mark.parametrize("name", SCORES)
def test_missing_weights_are_named_with_where_to_get_them(name, every_package, tmp_path):
    with pytest.raises(UserError, match=f"score {name}: its weights are missing") as caught:
        score(name, images(), weights=tmp_path, **counterparts(name))
    assert str(tmp_path) in caught.value.what
    assert "https://" in caught.value.fix or "hf download" in caught.value.fix


@pytest.mark.parametrize("name", SCORES)
def test_a_score_without_its_counterpart_is_refused(name):
    with pytest.raises(UserError, match="hold the images against") as caught:
        score(name, images())
    assert SCORES[name].against in caught.value.fix


@pytest.mark.parametrize("name", [name for name in SCORES if name != "inception-fid"])
def test_one_counterpart_for_each_image_is_asked(name):
    other = {key: value[:2] for key, value in counterparts(name).items()}
    with pytest.raises(UserError, match="3 images and 2"):
        score(name, images(), **other)


@pytest.mark.parametrize("count", [0, 1])
def test_a_set_of_one_image_has_no_spread(count):
    with pytest.raises(UserError, match=f"inception-fid: {count} images against 5") as caught:
        score("inception-fid", torch.zeros(count, 3, 299, 299), torch.zeros(5, 3, 299, 299))
    assert "2 of each or more" in caught.value.fix


def test_images_too_small_for_the_network_are_refused():
    with pytest.raises(UserError, match="8×8 pixels"):
        score("lpips", images(size=8), reference=images(size=8))


def test_an_unknown_score_is_named_with_the_closest():
    with pytest.raises(UserError, match="unknown score 'lpip'") as caught:
        score("lpip", images())
    assert "lpips" in caught.value.fix


def test_clip_scores_are_a_hundred_times_the_cosine_of_the_embeddings(clip_weights):
    from transformers import CLIPModel, CLIPProcessor

    found = score("clip", images(), prompts=PROMPTS, weights=clip_weights)
    assert available(clip_weights)["clip"] is None
    folder = clip_weights / "clip-vit-large-patch14"
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    pixels = ((images() + 1) * 127.5).round().byte()
    for i, prompt in enumerate(PROMPTS):
        inputs = processor(text=[prompt], images=[pixels[i]], return_tensors="pt")
        with torch.no_grad():
            text = model.get_text_features(inputs["input_ids"]).pooler_output
            image = model.get_image_features(inputs["pixel_values"]).pooler_output
        expected = 100 * torch.cosine_similarity(text, image).clamp(min=0)
        assert found[i].item() == pytest.approx(expected.item(), abs=1e-3)  # fp32, on a scale of 100


def test_clip_scores_do_not_depend_on_the_batch(clip_weights, monkeypatch):
    whole = score("clip", images(), prompts=PROMPTS, weights=clip_weights)
    monkeypatch.setattr(learned_scores, "BATCH", 2)
    parts = score("clip", images(), prompts=PROMPTS, weights=clip_weights)
    assert torch.allclose(whole, parts, atol=1e-3)  # fp32, on a scale of 100


def test_grey_images_are_scored_as_colour_images_of_equal_channels(clip_weights):
    grey = images()[:, :1]
    found = [score("clip", x, prompts=PROMPTS, weights=clip_weights) for x in (grey, grey.expand(-1, 3, -1, -1))]
    assert torch.equal(*found)


def test_weights_that_cannot_be_read_are_named(clip_weights):
    (clip_weights / "clip-vit-large-patch14" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="clip-vit-large-patch14 cannot be read"):
        score("clip", images(), prompts=PROMPTS, weights=clip_weights)


def test_the_hub_is_offline_while_a_score_is_computed_and_as_before_afterwards(clip_weights, monkeypatch):
    from huggingface_hub import constants

    before, seen = constants.HF_HUB_OFFLINE, []
    load = SCORES["clip"].load
    watched = learned_scores.LearnedScore(
        **{**vars(SCORES["clip"]), "load": lambda paths: seen.append(constants.HF_HUB_OFFLINE) or load(paths)}
    )
    monkeypatch.setitem(SCORES, "clip", watched)
    score("clip", images(), prompts=PROMPTS, weights=clip_weights)
    assert seen == [True]
    assert constants.HF_HUB_OFFLINE is before
