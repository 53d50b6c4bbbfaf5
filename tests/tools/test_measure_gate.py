"""The gate's measurement: what is planted in made-up scores is found, and the document says what was measured."""

from __future__ import annotations

import json

import measure_gate as tool
import numpy as np
import pytest
from click.testing import CliRunner
from common import ROOT
from compare_report import put_between
from gated import scores

from engines.artifacts import read_json
from exporter import losses
from exporter.losses import FAIL, NOT_ENOUGH, PASS

DOCUMENT, RESULTS = ROOT / "docs" / "gate.md", ROOT / "docs" / "gate.json"
OWN = 0.02  # the size of noise that hurts as much as quantization does


def drawn(seed, noise, number):
    """Scores as a model's: of a seed, lowered by noise in the weights, image by image and at random."""
    lost_db = 10 * np.log10(1 + (noise / OWN) ** 2)
    clean = np.array(scores(64, seed=seed)["psnr_db"])
    scatter = np.random.default_rng((seed, number)).standard_normal(64) * (noise > 0)
    return scores(64, seed=seed) | {"psnr_db": (clean - lost_db + scatter).tolist()}


@pytest.fixture
def plan(monkeypatch):
    monkeypatch.setattr(losses, "RESAMPLES", 300)
    return tool.Plan(samples=48, seeds=3, twins=2, resamples=20, trials=3)


def test_the_planted_noise_loses_what_it_is_to_lose(plan):
    found = tool.sized(drawn, plan)
    assert 10 * np.log10(1 + (found / OWN) ** 2) == pytest.approx(1.5, abs=0.3)  # and the scatter of 4 × 64 images


def test_a_planted_loss_is_found_and_equal_models_pass(plan):
    found = tool.measure(drawn, plan)
    assert [trial["psnr"] for trial in found["detection"]["trials"]] == [FAIL] * 3
    assert found["detection"]["passed"]
    for row in found["false_alarms"]["rows"]:
        assert row[PASS] + row[NOT_ENOUGH] + row[FAIL] == pytest.approx(1)
        assert row["limits"] == "0" or row[FAIL] == 0
    text = tool.tables(found)
    assert "Found: 3 of 3" in text


def test_unpaired_sets_share_no_image_and_paired_ones_are_of_the_same(plan):
    numbered = {"psnr_db": [float(i) for i in range(100)]}
    other = {"psnr_db": [1000 + value for value in numbered["psnr_db"]]}
    rng = np.random.default_rng(0)
    for old, new in tool.unpaired_sets(numbered, plan, rng):
        assert len({*old.scores["psnr_db"], *new.scores["psnr_db"]}) == 2 * plan.samples
    swapped = []
    for old, new in tool.paired_sets(numbered, other, plan, rng):
        difference = np.array(new.scores["psnr_db"]) - old.scores["psnr_db"]
        assert set(np.abs(difference)) == {1000}
        swapped.append(np.mean(difference > 0))
    assert np.mean(swapped) == pytest.approx(0.5, abs=0.1)  # three standard errors of 20 × 48 swaps are 0.05


@pytest.mark.parametrize(("missed", "code"), [(False, 0), (True, 3)])
def test_a_missed_bar_is_exit_code_3(monkeypatch, tmp_path, missed, code):
    part = {"passed": not missed}
    found = {"false_alarms": part | {"rows": [], "bar": 0.07}, "plan": {"resamples": 1, "samples": 1}}
    found["detection"] = {"passed": True, "trials": [], "bar": 0.9, "noise": 0.01}
    monkeypatch.setattr(tool, "measure", lambda *_: found)
    monkeypatch.setattr(tool, "Model", lambda *_: type("Model", (), {"scores": None}))
    result = CliRunner().invoke(tool.main, ["--quick", "--out", str(tmp_path / "gate.json")])
    assert result.exit_code == code
    assert json.loads((tmp_path / "gate.json").read_text())["model"] == "digits-dit"


def test_the_document_says_what_the_committed_measurement_says(tmp_path):
    found = read_json(RESULTS)
    assert found["false_alarms"]["passed"]
    assert found["detection"]["passed"]
    copy = tmp_path / "gate.md"
    copy.write_text(DOCUMENT.read_text(encoding="utf-8"), encoding="utf-8")
    put_between(copy, tool.BEGIN, tool.END, tool.tables(found))
    assert copy.read_text(encoding="utf-8") == DOCUMENT.read_text(encoding="utf-8")
