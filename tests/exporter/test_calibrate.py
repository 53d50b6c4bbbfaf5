"""Calibration sets: every step of the sampler's own run, repeatable, resumable, read one record at a time."""

from __future__ import annotations

import pytest
import torch

from calib_data.store import CalibrationSet
from engines import artifacts
from engines.errors import UserError
from exporter import calibrate as stage
from exporter.checkpoint import open_checkpoint
from exporter.conditions import Conditions, calibration_entries
from exporter.runners import TorchRunner
from exporter.sampling import denoise


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return open_checkpoint(str(tiny_folder), steps=3)


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(stage, "BATCH", 2)


def test_records_are_the_inputs_of_every_step(tiny, tmp_path, small_batches):
    data = CalibrationSet(stage.calibrate(tiny, tmp_path / "set", samples=3, seed=5))
    assert (len(data.shards), len(data.steps)) == (2, 3)
    runner = TorchRunner("float", tiny.load(), tiny.family)
    calls = denoise(runner, tiny, Conditions(tiny, calibration_entries(tiny, None)), [0, 1], 5)
    for call, (step, feeds) in zip(calls, data.read(data.shards[0]), strict=True):
        assert step == call.step
        assert {"step", "timestep"} <= feeds.keys()
        for name, value in feeds.items():
            assert torch.equal(value, torch.from_numpy(call.feeds[name])), name


def test_two_captures_have_the_same_digest_and_another_seed_another(tiny, tmp_path, small_batches):
    first = stage.calibrate(tiny, tmp_path / "a", samples=3)
    assert stage.calibrate(tiny, tmp_path / "b", samples=3).digest == first.digest
    assert stage.calibrate(tiny, tmp_path / "c", samples=3, seed=1).digest != first.digest


def test_whole_shards_of_a_stopped_capture_are_kept(tiny, tmp_path, small_batches, monkeypatch):
    undisturbed = stage.calibrate(tiny, tmp_path / "whole", samples=5)
    record, calls = stage._record, []

    def stop_in_third(*arguments):
        calls.append(arguments[-1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        record(*arguments)

    monkeypatch.setattr(stage, "_record", stop_in_third)
    with pytest.raises(KeyboardInterrupt):
        stage.calibrate(tiny, tmp_path / "set", samples=5)
    monkeypatch.setattr(stage, "_record", lambda *arguments: (calls.append(arguments[-1]), record(*arguments)))
    resumed = stage.calibrate(tiny, tmp_path / "set", samples=5)
    assert calls == [0, 1, 2, 2]
    assert resumed.digest == undisturbed.digest


def test_only_the_listed_steps_are_recorded(tiny, tmp_path):
    data = CalibrationSet(stage.calibrate(tiny, tmp_path / "set", samples=1, record_steps=[2, 0]))
    assert [step for step, _ in data.read(data.shards[0])] == [0, 2]


def test_a_step_the_sampler_lacks_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="step 3"):
        stage.calibrate(tiny, tmp_path / "set", samples=1, record_steps=[3])
    assert not list(tmp_path.iterdir())


def test_batches_mix_steps_and_lose_nothing(tiny, tmp_path, small_batches):
    data = CalibrationSet(stage.calibrate(tiny, tmp_path / "set", samples=3))
    rows = [batch["step"] for batch in data.batches(data.shards, rows=4)]
    assert sum(len(steps) for steps in rows) == 3 * 3
    assert any(len(set(steps.tolist())) > 1 for steps in rows)


def test_a_model_that_gives_nan_is_refused_before_anything_is_written(tiny, tmp_path, monkeypatch):
    run = TorchRunner.run
    monkeypatch.setattr(
        TorchRunner, "run", lambda self, feeds: {n: v * float("nan") for n, v in run(self, feeds).items()}
    )
    with pytest.raises(UserError, match="NaN or infinite values at step 0"):
        stage.calibrate(tiny, tmp_path / "set", samples=1)
    assert not list(tmp_path.iterdir())


def test_an_up_to_date_set_is_not_made_again(tiny, tmp_path):
    first = stage.calibrate(tiny, tmp_path / "set", samples=1)
    before = (first.path / artifacts.TIMINGS).stat().st_mtime_ns
    assert stage.calibrate(tiny, tmp_path / "set", samples=1).digest == first.digest
    assert (first.path / artifacts.TIMINGS).stat().st_mtime_ns == before


def test_own_labels_are_read_around_and_around_and_stand_in_the_manifest(tiny, tmp_path):
    made = stage.calibrate(tiny, tmp_path / "set", samples=3, prompts=["7", "04"])
    assert made.info["entries"] == ["7", "4"]
    data = CalibrationSet(made)
    for _, feeds in data.read(data.shards[0]):
        assert feeds["class_labels"].tolist() == [7, 4, 7]


def test_sets_of_other_labels_have_other_digests_and_equal_ones_are_kept(tiny, tmp_path):
    first = stage.calibrate(tiny, tmp_path / "a", samples=2, prompts=["1", "2"])
    assert stage.calibrate(tiny, tmp_path / "b", samples=2, prompts=["2", "1"]).digest != first.digest
    before = (first.path / artifacts.TIMINGS).stat().st_mtime_ns
    assert stage.calibrate(tiny, tmp_path / "a", samples=2, prompts=["01", "2"]).digest == first.digest
    assert (first.path / artifacts.TIMINGS).stat().st_mtime_ns == before


def test_a_label_the_model_lacks_is_refused_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(UserError, match="'10' is no class"):
        stage.calibrate(tiny, tmp_path / "set", samples=1, prompts=["3", "10"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "other",
    [{"samples": 3}, {"seed": 1}, {"record_steps": [0]}, {"prompts": ["1"]}],
    ids=["samples", "seed", "record_steps", "prompts"],
)
def test_a_set_is_found_again_by_what_it_was_asked_for(tiny, tmp_path, other):
    asked = {"samples": 1, "seed": 0, "record_steps": None, "prompts": None}
    made = stage.calibrate(tiny, tmp_path / "set", samples=1)
    assert artifacts.current(made.path, stage.request_for(tiny, **asked)) is not None
    assert artifacts.current(made.path, stage.request_for(tiny, **asked | other)) is None
