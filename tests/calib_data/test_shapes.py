"""The world of shapes: what can be said, drawn and measured is one and the same."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from calib_data import shapes
from engines.errors import UserError

NOISE = 0.1  # in [−1, 1]; the measure stands twice that


def sentences() -> list[str]:
    return [str(caption) for count in (1, 2) for caption in shapes.captions(count)]


def drawn(count: int, *, held_out: bool, seed: int = 0) -> list[shapes.Caption]:
    return list(itertools.islice(shapes.draw(np.random.default_rng(seed), held_out=held_out), count))


def test_every_caption_is_one_sentence_and_no_two_share_it():
    assert (len(shapes.captions(1)), len(shapes.captions(2))) == (180, 5184)
    assert len(set(sentences())) == 180 + 5184


def test_words_are_those_of_the_sentences():
    assert set(shapes.words()) == {word for sentence in sentences() for word in sentence.split()}
    assert shapes.words() == sorted(set(shapes.words()))


@pytest.mark.parametrize("caption", drawn(10, held_out=False) + drawn(10, held_out=True), ids=str)
def test_parsing_a_sentence_gives_its_caption(caption):
    assert shapes.parse(str(caption)) == caption
    assert shapes.parse(f"  {str(caption).replace(' ', '  ')} ") == caption


@pytest.mark.parametrize(
    ("sentence", "word"),
    [("a large pink circle at the top", "pink"), ("a large red circel at the top", "circel"), ("Three red", "Three")],
)
def test_the_first_unknown_word_is_named(sentence, word):
    with pytest.raises(UserError, match=f"unknown word '{word}'") as caught:
        shapes.parse(sentence)
    assert caught.value.fix


def test_a_misspelt_word_is_answered_with_the_closest():
    with pytest.raises(UserError) as caught:
        shapes.parse("a large red circel at the top")
    assert "'circle'" in caught.value.fix


@pytest.mark.parametrize("sentence", ["", "red", "a large red circle", "a red large circle at the top"])
def test_known_words_in_no_known_order_are_refused_with_an_example(sentence):
    with pytest.raises(UserError, match="is not a sentence") as caught:
        shapes.parse(sentence)
    assert "a large red circle at the top" in caught.value.fix


@pytest.mark.parametrize("held_out", [False, True])
def test_every_rendered_caption_is_measured_as_right_through_noise(held_out):
    rng = np.random.default_rng(7)
    for caption in drawn(150, held_out=held_out, seed=7):
        image = shapes.render(caption, rng)
        noisy = image + (NOISE * rng.standard_normal(image.shape)).astype(np.float32)
        assert shapes.accuracy(caption, image) == 1.0, caption
        assert shapes.accuracy(caption, noisy) == 1.0, caption


def test_pictures_of_other_captions_score_low():
    rng = np.random.default_rng(8)
    captions = drawn(200, held_out=False, seed=8)
    images = [shapes.render(caption, rng) for caption in captions]
    shuffled = [shapes.accuracy(c, i) for c, i in zip(captions[1:], images[:-1], strict=True)]
    # By chance size is right 1 time in 2, shape 1 in 3, colour 1 in 6, place 1 in 4 or 5; the best match is taken.
    assert 0.2 < np.mean(shuffled) < 0.4


def test_an_empty_picture_shows_nothing():
    empty = shapes.BACKGROUND.astype(np.float32)
    assert [shapes.accuracy(caption, empty) for caption in drawn(10, held_out=False)] == [0.0] * 10


def test_a_picture_of_the_other_relation_has_its_objects_right_alone():
    asked = shapes.parse("a small blue square above a large white triangle")
    image = shapes.render(shapes.parse("a small blue square below a large white triangle"), np.random.default_rng(0))
    right = shapes.attributes(asked, shapes.measure(image))
    assert right == {"shape": [True] * 2, "colour": [True] * 2, "size": [True] * 2, "position": [False]}


def test_a_second_object_that_was_not_asked_for_does_not_stand_for_the_first():
    asked = shapes.parse("a small blue square at the top")
    image = shapes.render(shapes.parse("a small blue square above a large white triangle"), np.random.default_rng(0))
    assert shapes.accuracy(asked, image) < 0.5  # the largest object is judged


def test_rendering_repeats_with_its_seed_and_varies_with_another():
    caption = drawn(1, held_out=False)[0]
    first, again, other = (shapes.render(caption, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_pictures_lie_within_the_range():
    rng = np.random.default_rng(3)
    images = np.stack([shapes.render(caption, rng) for caption in drawn(50, held_out=False)])
    assert images.shape == (50, 3, 32, 32)
    assert images.min() >= -1
    assert images.max() <= 1


def test_a_fifth_of_the_captions_is_held_out():
    for count in (1, 2):
        share = np.mean([caption.held_out for caption in shapes.captions(count)])
        assert share == pytest.approx(0.2, abs=0.1)  # 180 draws: a standard deviation is 0.03


def test_the_sides_of_the_split_are_disjoint():
    train, held = ({str(c) for c in drawn(2000, held_out=side)} for side in (False, True))
    assert not train & held


def test_one_object_is_drawn_as_often_as_two():
    counts = [len(caption.objects) for caption in drawn(1000, held_out=False)]
    assert np.mean(counts) == pytest.approx(1.5, abs=0.07)  # four standard errors
