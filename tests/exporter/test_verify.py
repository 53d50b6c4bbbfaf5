"""`verify` runs what a bundle has recorded, and tells what is damaged from what is wrong."""

from __future__ import annotations

import json

import bundles
from safetensors.numpy import save


def test_a_whole_bundle_is_verified(cli, tmp_path):
    folder = bundles.tiny_bundle(tmp_path / "tiny")
    done = cli("verify", folder)
    assert done.returncode == 0, done.stderr
    assert "all as its manifest says" in done.stdout
    assert done.stdout.count("equal") == done.stdout.count("passed") == 2
    rows = json.loads(cli("verify", folder, "--json").stdout)["engines"][0]["rows"]
    assert [row["value_db"] for row in rows] == [None, None]  # equal: JSON has no infinity


def test_one_that_gives_other_numbers_fails_with_exit_code_3(cli, tmp_path):
    other = {"golden.safetensors": save(bundles.golden("index"))}  # an engine that knows no step gives other outputs
    folder = bundles.tiny_bundle(tmp_path / "tiny", files=other)
    done = cli("verify", folder, "--json")
    assert done.returncode == 3
    found = json.loads(done.stdout)
    assert not found["passed"]
    assert [row["passed"] for row in found["engines"][0]["rows"]] == [True, False]


def test_a_damaged_one_is_refused_with_exit_code_2(cli, tmp_path):
    folder = bundles.tiny_bundle(tmp_path / "tiny")
    with (folder / "engines/ort/model.onnx").open("r+b") as file:
        file.write(b"\0")
    done = cli("verify", folder)
    assert done.returncode == 2
    assert "model.onnx" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_engine_that_cannot_run_here_is_named_with_the_reason(cli, tmp_path):
    entry = bundles.engine_entry(folder="engines/x", file="engine.plan", backend="trt-rtx", gpu="sm89", session=None)
    folder = bundles.tiny_bundle(
        tmp_path / "tiny", edit=lambda info: info["engines"].update(x=entry), files={"engines/x/engine.plan": b""}
    )
    done = cli("verify", folder)
    assert done.returncode == 0, done.stderr
    assert "not run: no NVIDIA GPU" in done.stdout
    assert cli("verify", folder, "--backend", "trt-rtx").returncode == 2


def test_inspect_shows_the_contract_of_a_folder_and_of_a_zip(cli, tmp_path):
    from engines.zipped import pack

    folder = bundles.tiny_bundle(tmp_path / "tiny", guided=True)
    pack(folder, tmp_path / "tiny.zip")
    for path in (folder, tmp_path / "tiny.zip"):
        done = cli("inspect", path)
        assert done.returncode == 0, done.stderr
        assert "input  hidden_states: float [batch, 1, 2, width], hidden_states" in done.stdout
        assert "axis  width: 2 … 8, multiples of 2" in done.stdout
        assert "3 steps, guidance 2" in done.stdout
        assert "engine  ort: fp32" in done.stdout
