"""The shapes task: attributes are measured, features see what pictures show."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from calib_data import shapes, shipped
from engines.errors import UserError
from exporter import tasks
from exporter.metrics import frechet_distance
from exporter.tasks.shapes import ANSWERS, AttributeNet, Shapes, answers, details

WEIGHTS = shipped.folder("shapes-unet") / "features.safetensors"


def pictures(count: int, seed: int = 0, *, held_out: bool = True) -> tuple[torch.Tensor, list[shapes.Caption]]:
    rng = np.random.default_rng(seed)
    captions = list(itertools.islice(shapes.draw(rng, held_out=held_out), count))
    return torch.from_numpy(np.stack([shapes.render(caption, rng) for caption in captions])), captions


def rendered(*sentences: str) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.stack([shapes.render(shapes.parse(sentence), rng) for sentence in sentences]))


def test_pictures_of_their_captions_are_all_right():
    images, captions = pictures(20)
    scores = Shapes(None).scores(images, [str(caption) for caption in captions])
    assert scores.tolist() == [1.0] * 20
    assert scores.dtype == torch.float64


def test_each_attribute_counts_the_same():
    image = rendered("a large red circle at the top")
    asked = ["a small red circle at the top", "a small blue circle at the top", "a small blue square at the bottom"]
    assert Shapes(None).scores(image.expand(3, -1, -1, -1), asked).tolist() == [0.75, 0.5, 0.0]


def test_an_empty_picture_shows_nothing_that_was_asked():
    empty = torch.from_numpy(shapes.BACKGROUND)[None]
    assert Shapes(None).scores(empty, ["a large red circle at the top"]).item() == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_picture_without_numbers_shows_nothing(bad):
    image = torch.full((1, 3, 32, 32), bad)
    sentence = "a large white square in the center"
    assert Shapes(None).scores(image, [sentence]).item() == 0.0
    assert set(details(image, [sentence])["one object"].values()) == {0.0}


def test_details_tell_kinds_of_attributes_and_counts_of_objects_apart():
    one, two = "a large red circle at the top", "a small blue square above a large white triangle"
    images = rendered(one, one, two)
    asked = [one, "a large blue circle at the top", "a small blue square above a large white circle"]
    assert details(images, asked) == {
        "one object": {"shape": 1.0, "colour": 0.5, "size": 1.0, "position": 1.0},
        "two objects": {"shape": 0.5, "colour": 1.0, "size": 1.0, "position": 1.0},
    }


def test_details_leave_out_what_nobody_asked_for():
    sentence = "a large red circle at the top"
    assert list(details(rendered(sentence), [sentence])) == ["one object"]


def test_one_picture_has_one_answer_however_it_is_said():
    left = shapes.parse("a small blue square left of a large red circle")
    right = shapes.parse("a large red circle right of a small blue square")
    assert answers(left) == answers(right)
    assert answers(left) != answers(shapes.parse("a small blue square right of a large red circle"))


def test_answers_tell_all_pictures_apart():
    captions = [caption for count in (1, 2) for caption in shapes.captions(count)]
    found = {tuple(answers(caption)) for caption in captions}
    assert (
        len(found) == len(shapes.captions(1)) + len(shapes.captions(2)) // 2
    )  # each pair can be said from either side
    assert all(0 <= index < classes for answer in found for index, classes in zip(answer, ANSWERS, strict=True))


def test_the_shipped_network_reads_pictures_of_captions_it_never_saw():
    images, captions = pictures(300, seed=5)
    net = tasks.load("shapes", WEIGHTS).net
    with torch.no_grad():
        found = torch.stack([part.argmax(dim=1) for part in net(images)], dim=1)
    right = found == torch.tensor([answers(caption) for caption in captions])
    assert right.double().mean() > 0.99


def test_features_tell_a_lost_colour_from_chance():
    task = tasks.load("shapes", WEIGHTS)
    (real, _), (images, captions) = pictures(400, seed=1), pictures(400, seed=2)
    kept = torch.tensor(["red" not in str(caption) for caption in captions])
    real, features = task.features(real), task.features(images)
    assert features.shape == (400, 64)
    chance = frechet_distance(real, features[: int(kept.sum())])
    assert frechet_distance(real, features[kept]) > 1.5 * chance


def test_the_shipped_weights_are_small_and_half_as_wide():
    from safetensors.torch import load_file

    assert WEIGHTS.stat().st_size < 1 << 20
    assert {tensor.dtype for tensor in load_file(WEIGHTS).values()} == {torch.float16}


def test_scores_need_no_network_but_features_do():
    task = tasks.load("shapes", None)
    with pytest.raises(UserError, match="no weights were given"):
        task.features(torch.zeros(1, 3, 32, 32))


def test_an_unknown_word_in_what_was_asked_is_named():
    with pytest.raises(UserError, match="'pink'"):
        Shapes(None).scores(torch.zeros(1, 3, 32, 32), ["a large pink circle at the top"])


def test_the_network_is_of_the_size_that_is_shipped():
    assert sum(p.numel() for p in AttributeNet().parameters()) < 1 << 18
