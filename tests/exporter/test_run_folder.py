"""A run's folder: one run writes there at a time, and one that wrote nothing leaves nothing."""

from __future__ import annotations

import pytest
from gated import made, made_run

from engines import artifacts
from engines.errors import UserError
from exporter.run_folder import locked, remove_stale


def test_a_run_that_wrote_nothing_leaves_no_folder_that_it_made(tmp_path):
    with pytest.raises(UserError), locked(tmp_path / "new" / "out"):
        raise UserError("refused", fix="none")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_stays(tmp_path):
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_stays_and_goes_on_under_the_same_lock(tmp_path):
    out = tmp_path / "out"
    with locked(out):
        (out / "calibration").mkdir()
        with pytest.raises(UserError, match="another run is writing here"), locked(out):
            pytest.fail("two at once")
    assert sorted(path.name for path in out.iterdir()) == [".lock", "calibration"]
    with locked(out):
        pass


def test_what_an_earlier_version_left_is_removed_before_it_is_read(tmp_path, capsys):
    folder = made_run(tmp_path / "run")
    old = folder / "graph" / "fp16"
    graph = made(old, "graph", {"quantized": "0" * 64}, {}, "graph")
    artifacts.seal(old / "manifest.json", graph.manifest | {"schema_version": artifacts.SCHEMA_VERSION - 1})
    remove_stale(folder, artifacts.open_artifact(folder / "quantized", "quantized"))
    assert not old.exists()
    assert "graph/fp16: of an earlier version" in capsys.readouterr().err
    assert (folder / "engines" / "ort").is_dir()
