"""Calibration sets: which shards hold the first trajectories."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from calib_data.store import CalibrationSet, shard_name

SHARDS = [shard_name(i) for i in range(4)]


@pytest.mark.parametrize(("asked", "count"), [(None, 4), (1, 1), (16, 1), (17, 2), (50, 4), (64, 4)])
def test_the_first_trajectories_are_read_by_whole_shards(asked, count):
    artifact = SimpleNamespace(info={"record_steps": [0, 1], "samples": 64}, files=lambda start: reversed(SHARDS))
    assert CalibrationSet(artifact).first(asked) == SHARDS[:count]
