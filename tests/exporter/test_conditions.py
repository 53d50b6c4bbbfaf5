"""Conditions: each sample is asked its entry of a list, captions are read once each, lists come from where said."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from common import FAMILIES

from calib_data.prompts import GENERAL, read_list
from engines.errors import UserError
from exporter import text
from exporter.checkpoint import open_checkpoint
from exporter.conditions import ENCODE, Conditions, calibration_entries, validation_entries


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return open_checkpoint(str(tiny_folder), steps=2)


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """Opens a family's small model with drawn weights and without text encoders."""

    def open_(name):
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps(FAMILIES[name]))
        return open_checkpoint(f"random:{folder}", steps=2)

    return open_


@pytest.fixture(scope="module")
def painter(random_model):
    return random_model("sdxl")


def test_a_list_is_read_around_and_around(tiny):
    conditions = Conditions(tiny, ["3", "1"])
    assert conditions.asked([0, 1, 2, 5]) == ["3", "1", "3", "1"]
    assert conditions.of([0, 1, 2])["class_labels"].tolist() == [3, 1, 3]


def test_guidances_other_half_has_the_null_class(tiny):
    assert Conditions(tiny, ["3", "1"]).of([0, 1], null=True)["class_labels"].tolist() == [10, 10]


def test_a_model_without_condition_is_asked_nothing(random_model):
    conditions = Conditions(random_model("unet"), [])
    assert conditions.asked([0, 1]) == []
    assert conditions.of([0, 1]) == {}
    conditions.read(range(4))
    assert conditions.of([0, 1], null=True) == {}


def test_what_every_caption_shares_is_added_to_every_row(painter):
    rows = Conditions(painter, ["a", "b"]).of([0, 1, 2])
    assert rows.keys() == {spec.name for spec in painter.family.inputs()[2:]}
    assert rows["time_ids"].tolist() == [[128, 128, 0, 0, 128, 128]] * 3
    assert {len(value) for value in rows.values()} == {3}


def test_a_row_depends_on_its_caption_alone(painter):
    first = Conditions(painter, ["a red fox", "a bowl"]).of([0, 1])
    again = Conditions(painter, ["snow", "a bowl", "x", "a red fox"]).of([3, 1])
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
    assert not torch.equal(*first["encoder_hidden_states"])


def test_guidances_other_half_is_one_for_all_captions(painter):
    rows = Conditions(painter, ["a", "b"]).of([0, 1], null=True)
    assert torch.equal(*rows["encoder_hidden_states"])
    assert torch.equal(rows["text_embeds"][0], Conditions(painter, ["c"]).of([0], null=True)["text_embeds"][0])


def test_stand_ins_are_said_to_be_such(painter, capsys):
    Conditions(painter, ["a"]).of([0])
    assert "no text encoder" in capsys.readouterr().err


def test_every_caption_is_encoded_once_a_few_at_a_time(painter, monkeypatch):
    drawn, seen = text.drawn, []
    monkeypatch.setattr(text, "drawn", lambda family, entries: (seen.append(list(entries)), drawn(family, entries))[1])
    captions = [f"caption {i}" for i in range(ENCODE + 2)]
    conditions = Conditions(painter, captions)
    conditions.read(range(30))
    assert seen == [captions[:ENCODE], captions[ENCODE:]]
    conditions.of(range(5))
    conditions.of([2, 2, 9], null=True)
    assert len(seen) == 2


def test_only_the_captions_that_samples_ask_for_are_encoded(painter, monkeypatch):
    drawn, seen = text.drawn, []
    monkeypatch.setattr(text, "drawn", lambda family, entries: (seen.extend(entries), drawn(family, entries))[1])
    Conditions(painter, [f"caption {i}" for i in range(50)]).read(range(3))
    assert seen == ["caption 0", "caption 1", "caption 2"]


def test_without_a_list_labels_are_all_classes_and_captions_those_that_ship(tiny, painter, random_model):
    assert calibration_entries(tiny, None) == [str(i) for i in range(10)]
    assert calibration_entries(painter, None) == read_list(GENERAL)
    assert calibration_entries(random_model("unet"), None) == []


def test_a_users_list_wins(tiny, painter):
    assert calibration_entries(tiny, ["7", "007", "0"]) == ["7", "7", "0"]
    assert calibration_entries(painter, ["7", "a fox"]) == ["7", "a fox"]


@pytest.mark.parametrize("entry", ["10", "-1", "1.0", "cat", "", "0x1", "٣x", "²"])
def test_what_is_no_class_is_refused_with_the_range(tiny, entry):
    with pytest.raises(UserError, match="is no class") as caught:
        calibration_entries(tiny, ["1", entry])
    assert repr(entry) in caught.value.what
    assert "0 … 9" in caught.value.fix


def test_a_list_for_a_model_that_reads_none_is_refused(random_model):
    with pytest.raises(UserError, match="without prompt or label") as caught:
        calibration_entries(random_model("unet"), ["a fox"])
    assert "--prompts" in caught.value.fix


def test_a_models_own_lists_are_those_its_sampler_names(painter):
    (painter.root / "mine.txt").write_text("a fox\n")
    (painter.root / "held-out.txt").write_text("a bowl\na cup\n")
    own = replace(painter, sampler=painter.sampler | {"prompts": "mine.txt", "validation_prompts": "held-out.txt"})
    assert calibration_entries(own, None) == ["a fox"]
    assert calibration_entries(own, ["a cat"]) == ["a cat"]
    assert validation_entries(own, ["a fox"]) == ["a bowl", "a cup"]
    assert validation_entries(painter, ["a fox"]) == ["a fox"]


@pytest.mark.parametrize("key", ["prompts", "validation_prompts"])
def test_a_list_outside_the_models_folder_is_refused(painter, key):
    own = replace(painter, sampler=painter.sampler | {key: "../elsewhere.txt"})
    with pytest.raises(UserError, match="leaves the folder"):
        calibration_entries(own, None) if key == "prompts" else validation_entries(own, [])


def with_list(checkpoint, tmp_path, key, *lines):
    (tmp_path / "list.txt").write_text("".join(f"{line}\n" for line in lines))
    return replace(checkpoint, root=tmp_path, sampler=checkpoint.sampler | {key: "list.txt"})


def test_a_class_models_own_lists_are_read(tiny, tmp_path):
    assert calibration_entries(with_list(tiny, tmp_path, "prompts", "7", "2"), None) == ["7", "2"]
    assert validation_entries(with_list(tiny, tmp_path, "validation_prompts", "3"), ["7"]) == ["3"]


@pytest.mark.parametrize("line", ["cat", "10", "1001"])
def test_a_class_models_own_list_of_anything_but_classes_is_refused(line, tiny, tmp_path):
    with pytest.raises(UserError, match=f"'{line}' is no class"):
        calibration_entries(with_list(tiny, tmp_path, "prompts", line), None)
    with pytest.raises(UserError, match=f"'{line}' is no class"):
        validation_entries(with_list(tiny, tmp_path, "validation_prompts", line), ["1"])


def test_a_list_of_a_model_that_reads_nothing_is_refused(random_model, tmp_path):
    with pytest.raises(UserError, match="draws without prompt or label"):
        validation_entries(with_list(random_model("unet"), tmp_path, "validation_prompts", "a"), [])
