"""What a bundle has recorded: other than its contract says, it is refused; a number that is none fails the test."""

from __future__ import annotations

import bundles
import numpy as np
import pytest
from safetensors.numpy import save

import engines
from engines.errors import UserError

LATENT = np.ones((2, *bundles.SHAPE), np.float32)
PICTURE = {
    "picture/noise": LATENT, "picture/latent": LATENT, "picture/wanted/class_labels": np.arange(2),
}  # fmt: skip


def opened(folder, arrays, peak=2.0):
    def edit(info):
        info["golden"]["picture"] = {"runner": "quantized", "count": 2, "limits_db": {"fp32": -1e9}, "peak": peak}

    files = {"golden.safetensors": save({name: np.ascontiguousarray(value) for name, value in arrays.items()})}
    return engines.load(bundles.tiny_bundle(folder, edit=edit, files=files))


def test_recorded_steps_and_pictures_pass(tmp_path):
    rows = opened(tmp_path / "tiny", bundles.golden(None) | PICTURE).self_test()
    assert [row["what"] for row in rows] == ["step 0", "step 2", "2 samples"]


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("2/expected", None, "recorded no 'expected'"),
        ("0/feeds/timestep", None, "recorded no 'feeds/timestep'"),
        ("0/feeds/timestep", lambda value: value[:2], "axis 'batch' is 4 in"),
        ("0/feeds/timestep", lambda value: value[None], r"has shape \[1, 4\]"),
        ("0/feeds/class_labels", lambda value: value.astype(np.float32), "is of type float32"),
        ("0/expected", lambda value: value[..., :2], "axis 'width' is 4 in"),
        ("0/expected", lambda value: value[:0], r"has shape \[0, 1, 2, 4\]"),
        ("picture/noise", None, "recorded no 'noise'"),
        ("picture/latent", lambda value: value[:, 0], r"has shape \[2, 2, 4\]"),
        ("picture/wanted/class_labels", lambda value: value[:1], "there are 2 samples"),
    ],
)
def test_recorded_arrays_that_do_not_fit_the_contract_are_refused(tmp_path, name, change, told):
    arrays = bundles.golden(None) | PICTURE
    found = arrays.pop(name)
    engine = opened(tmp_path / "tiny", arrays | ({name: change(found)} if change else {}))
    with pytest.raises(UserError, match=told):
        engine.self_test()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["0/expected", "picture/latent"])
def test_what_is_no_number_fails(tmp_path, name, value):
    arrays = bundles.golden(None) | PICTURE
    engine = opened(tmp_path / "tiny", arrays | {name: arrays[name] * np.float32(value)})
    with pytest.raises(UserError, match=r"does not give what was recorded: .* -inf dB"):
        engine.self_test()


def test_a_peak_beyond_any_picture_is_no_overflow(tmp_path):
    assert opened(tmp_path / "tiny", bundles.golden(None) | PICTURE, peak=2.0**62).self_test()
