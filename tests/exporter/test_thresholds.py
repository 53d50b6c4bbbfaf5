"""Thresholds: what ships is valid, what a file leaves out is not judged, and what it gets wrong is named."""

from __future__ import annotations

import pytest

from engines.errors import UserError
from exporter import thresholds
from exporter.thresholds import load


def written(tmp_path, text):
    path = tmp_path / "limits.toml"
    path.write_text(text)
    return path


def test_the_shipped_thresholds_limit_every_score():
    found = load(thresholds.SHIPPED)
    assert set(found.most_lost) == {"psnr_db", "ssim", "cosine", "task_score"}
    assert found.most_slower is not None
    assert found.most_larger is not None
    assert (found.false_alarm, found.samples) == (0.05, 32)


def test_limits_beside_a_recipe_go_with_its_runs(tmp_path):
    run, recipe = tmp_path / "run", tmp_path / "mine.toml"
    run.mkdir()
    assert thresholds.beside("fp8") is None
    assert thresholds.beside(str(recipe)) is None
    assert thresholds.of_run(run) == thresholds.SHIPPED
    (tmp_path / "mine.check.toml").write_text("[psnr_db]\nmost_lost = 1.5")
    thresholds.keep(thresholds.beside(str(recipe)), run)
    assert load(thresholds.of_run(run)).most_lost == {"psnr_db": 1.5}
    thresholds.keep(None, run)  # of a recipe that has none
    assert thresholds.of_run(run) == thresholds.SHIPPED


def test_limits_beside_a_recipe_are_refused_before_it_runs(tmp_path):
    (tmp_path / "mine.check.toml").write_text("[psnr]\nmost_lost = 1.5")
    with pytest.raises(UserError, match=r"mine\.check\.toml: unknown section 'psnr'"):
        thresholds.beside(str(tmp_path / "mine.toml"))


def test_what_a_file_leaves_out_is_not_judged(tmp_path):
    found = load(written(tmp_path, "[psnr_db]\nmost_lost = 1\nleast = 40\n[samples]\nleast = 64"))
    assert (found.most_lost, found.least, found.samples) == ({"psnr_db": 1}, {"psnr_db": 40}, 64)
    assert (found.most_slower, found.most_larger, found.false_alarm) == (None, None, 0.05)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[psnr]\nmost_lost = 1", ("section 'psnr'", "did you mean 'psnr_db'")),
        ("[psnr_db]\nmost_lots = 1", ("[psnr_db]", "key 'most_lots'", "did you mean 'most_lost'")),
        ("[task_score]\nleast = 0.9", ("[task_score]", "key 'least'", "known: most_lost")),
        ("psnr_db = 1", ("psnr_db = 1", "[psnr_db]")),
        ("[psnr_db]\nmost_lost = -1", ("most_lost = -1", "negative")),
        ("[psnr_db]\nmost_lost = 'much'", ("'much' is no number",)),
        ("[psnr_db]\nmost_lost = true", ("True is no number",)),
        ("[psnr_db]\nmost_lost = nan", ("nan is no number",)),
        ("[psnr_db]\nmost_lost = 1\n[level]\nfalse_alarm = 1.5", ("false_alarm = 1.5", "0.01 … 0.5")),
        ("[psnr_db]\nmost_lost = 1\n[samples]\nleast = 1", ("least = 1", "8 or more")),
        ("[level]\nfalse_alarm = 0.05", ("limits nothing",)),
        ("", ("limits nothing",)),
        ("[psnr_db", ("not valid TOML",)),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, text, words):
    path = written(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


def test_files_that_cannot_be_thresholds_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "none.toml")
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path)
    monkeypatch.setattr(thresholds, "MAX_BYTES", 10)
    with pytest.raises(UserError, match="larger than 10 bytes"):
        load(written(tmp_path, "[psnr_db]\nmost_lost = 1"))
