"""Captions as token ids without transformers: the ids that transformers gives, whatever the caption."""

from __future__ import annotations

import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from families import family, tokenizer
from pipelines import TOKENS, clip_tokenizer

from engines.errors import UserError
from engines.text import Words
from exporter.text_graph import TextHalf

CAPTIONS = [
    "", " ", "a red circle", "A  Red\tCIRCLE\n", "it's a circle, isn't it?", "red circle " * 30, "x" * 500,
    "naïve café", "nai\u0308ve cafe\u0301", "東京 の 夜", "🦊👩‍👩‍👧 and \u200b\u00a0space", "\u0000 null",
    "Straße İstanbul ﬁ ½",
    "<|endoftext|> a red <|startoftext|> circle", "<pad> <|endoftext|>", "12345 3.14 #%&", "مرحبا", "re" * 40,
]  # fmt: skip


def half(words):
    return TextHalf(SimpleNamespace(components={"tokenizer": words, "vae": None}), family("sd"))


def written(words, folder):
    """Returns the file that a bundle would hold of a tokenizer, opened."""
    (entry,) = half(words).write_tokenizers(folder)
    return Words(folder / entry["tokenizer"], (entry["pad"], entry["eos"]))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return clip_tokenizer(), written(clip_tokenizer(), tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def whole_words(tmp_path_factory):
    return written(tokenizer(TOKENS, clip=True), tmp_path_factory.mktemp("words"))


def test_ids_are_those_of_transformers(clip):
    theirs, ours = clip
    found = ours.ids(CAPTIONS)
    assert found.dtype == np.int64
    assert found.shape == (len(CAPTIONS), TOKENS)
    np.testing.assert_array_equal(found, half(theirs).read(CAPTIONS)["tokens"])


def test_ids_of_random_characters_are_those_of_transformers(clip):
    theirs, ours = clip
    drawn = random.Random(0)
    ranges = [(0, 0x7F), (0x80, 0x2FF), (0x300, 0x36F), (0x2000, 0x206F), (0x4E00, 0x4FFF), (0x1F300, 0x1F6FF)]
    captions = [
        "".join(chr(drawn.randint(*drawn.choice(ranges))) for _ in range(drawn.randrange(40))) for _ in range(300)
    ]
    np.testing.assert_array_equal(ours.ids(captions), half(theirs).read(captions)["tokens"])


def test_a_caption_is_read_the_same_whatever_stands_beside_it(clip):
    _, ours = clip
    alone = np.concatenate([ours.ids([caption]) for caption in CAPTIONS])
    np.testing.assert_array_equal(alone, ours.ids(CAPTIONS))


def test_a_whole_word_that_is_unknown_is_named_with_close_ones(whole_words):
    with pytest.raises(UserError, match="knows no 'cirlce'") as caught:
        whole_words.ids(["a red circle", "a red cirlce"])
    assert "'circle'" in caught.value.fix


def test_known_words_pass(whole_words):
    theirs = half(tokenizer(TOKENS, clip=True)).read(["a red circle", ""])["tokens"]
    np.testing.assert_array_equal(whole_words.ids(["a red circle", ""]), theirs)


@pytest.mark.parametrize("caption", [3, None, ("a", "pair"), "\ud800"])
def test_what_is_no_text_is_refused(clip, caption):
    with pytest.raises(UserError, match="captions"):
        clip[1].ids(["a red circle", caption])


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(UserError, match="no tokenizer"):
        Words(tmp_path / "tokenizer.json")


def test_the_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError) as caught:
        Words(tmp_path / "tokenizer.json")
    assert caught.value.fix == "pip install tokenizers, or give token ids"
