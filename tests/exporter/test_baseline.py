"""Baselines: what is written is read, whole or not at all; anything else is refused by name."""

from __future__ import annotations

import json
import os

import pytest
from gated import made_run, measured

from engines.errors import UserError
from exporter import baseline, run_folder
from exporter.check import opened


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "mine.json"
    baseline.write(measured(), path)
    assert baseline.read(path) == measured()
    assert path.stat().st_size < 100_000
    assert [one.name for one in path.parent.iterdir()] == ["mine.json"]


def test_a_write_that_is_cut_off_leaves_the_old_baseline(tmp_path, monkeypatch):
    path = tmp_path / "mine.json"
    baseline.write(measured(), path)

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        baseline.write(measured(seed=1), path)
    assert baseline.read(path) == measured()


def test_a_baseline_holds_ratios_of_times_and_no_times(tmp_path):
    found, _ = opened(made_run(tmp_path / "run", ms=20.0))
    slow, _ = opened(made_run(tmp_path / "slow", ms=20.0, throughput=times(80.0, 40.0)))
    assert found.speeds["ort batch 8"].ratio == slow.speeds["ort batch 8"].ratio == 0.5
    assert found.speeds["quantized batch 8"].ratio == 90 / 40


def times(base, own):
    return [{"runner": n, "batch": 8, "ms_p50": ms, "ms_p95": ms} for n, ms in (("float", base), ("ort", own))]


def test_a_runs_digests_are_those_of_its_artifacts(tmp_path):
    folder = made_run(tmp_path)
    found, _ = opened(folder)
    run = run_folder.open_artifacts(folder)
    assert found.digests == {
        "model": "a" * 64,
        "recipe": "b" * 64,
        "graph fp32": run.graphs["fp32"].digest,
        "quantized": run.quantized.digest,
        "engine ort": run.engines["ort"].digest,
    }
    assert found.versions == {"export_engine": "0.1.0", "torch": "2.13.0"}
    assert found.weights == {"the model": 1000, "ort": 1100}


def test_what_changed_is_named():
    new = measured(digests=measured().digests | {"engine ort": "9" * 64}, versions={"torch": "2.14.0", "onnx": "1"})
    assert baseline.changes(measured(), measured()) == []
    assert baseline.changes(measured(), new) == [
        f"engine ort {'d' * 12} → {'9' * 12}",
        "torch 2.13.0 → 2.14.0",
        "onnx none → 1",
    ]


@pytest.fixture
def content(tmp_path):
    baseline.write(measured(), tmp_path / "mine.json")
    return json.loads((tmp_path / "mine.json").read_text())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(schema_version=2), "schema version 2, this program reads 1"),
        (lambda c: c.update(kind="report"), "is no baseline"),
        (lambda c: c.pop("schema_version"), "is no baseline"),
        (lambda c: c.pop("seed"), "malformed"),
        (lambda c: c.update(more=1), "malformed"),
        (lambda c: c.update(seed="0"), "malformed"),
        (lambda c: c["digests"].pop("model"), "malformed"),
        (lambda c: c["scores"]["ssim"].pop(), "malformed"),
        (lambda c: c["scores"]["ssim"].__setitem__(3, "1"), "malformed"),
        (lambda c: c["scores"]["ssim"].__setitem__(3, 10**400), "malformed"),
        (lambda c: c.update(scores={}), "malformed"),
        (lambda c: c["scores"].update(beauty=c["scores"]["ssim"]), "malformed"),
        (lambda c: c["speeds"]["ort batch 8"].pop("ratio"), "malformed"),
        (lambda c: c["speeds"]["ort batch 8"].update(ratio=0), "malformed"),
        (lambda c: c["speeds"]["ort batch 8"].update(p95_over_p50=[1]), "malformed"),
        (lambda c: c["weights"].update(ort=0), "malformed"),
        (lambda c: c["weights"].update(ort=1.5), "malformed"),
    ],
)
def test_a_baseline_that_was_edited_is_refused(content, tmp_path, change, said):
    path = tmp_path / "mine.json"
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=said) as caught:
        baseline.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"), [("{", "not valid JSON"), ("[]", "holds a list"), ('{"kind": NaN}', "not valid JSON")]
)
def test_a_file_that_is_no_baseline_is_refused(tmp_path, text, said):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        baseline.read(path)


def test_a_file_too_large_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "mine.json"
    with path.open("wb") as file:
        file.truncate(baseline.MAX_BYTES + 1)
    with pytest.raises(UserError, match=f"{baseline.MAX_BYTES + 1} bytes, more than"):
        baseline.read(path)
